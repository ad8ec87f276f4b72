"""The passes of a Keras model over the data: normalized by the batch, by the moving statistics, by the population's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from keras import tree

from batchnorm.doctor.measure import layers as measured
from batchnorm.doctor.measure.effect import Outcome, features_of
from batchnorm.doctor.measure.layers import Array, Layer, Samples
from batchnorm.doctor.measure.runs import Runs
from batchnorm.keras.models.batches import Forward, default_forward, inputs_of
from batchnorm.keras.models.layers import Found, as_numpy
from batchnorm.keras.models.observe import Input, LayerCall, Observer, Statistics, StatisticsFor, statistics_of
from batchnorm.models.execution.progress import Bar
from batchnorm.reference.statistics import Moments, merge

Loss = Callable[[Any, Any], Any]

# Kinds of floating-point dtypes; bfloat16 counts as a void type in NumPy.
_FLOATING = "fV"
# Memory for the batches that are kept for the later passes.
_KEPT_BYTES = 2**30


class KerasPasses(Runs):
    """Passes of a Keras model in evaluation mode.

    Args:
        model: The model.
        found: Its layers.
        layers: The layers in the terms of the rules.
        forward: Calls the model with a batch in evaluation; None for `model(x, training=False)`.
        loss: The loss of the targets and the model's output, or None.
        budget: Number of further passes for single layers.
        bar: Shows the progress.
    """

    def __init__(
        self, model: Any, found: list[Found], layers: tuple[Layer, ...], forward: Forward | None, loss: Loss | None,
        budget: int, bar: Bar,
    ) -> None:  # fmt: skip
        super().__init__(list(layers), budget)
        self._model, self._loss, self._bar = model, loss, bar
        self._forward = forward or default_forward("diagnose")
        self._sees_training = forward is None
        self._moving = [statistics_of(each.module) for each in found]
        self._observer = Observer(model, found)
        self._batches: list[Any] = []  # that are kept for the later passes

    def first(self, batches: Iterable[Any]) -> None:
        """Run each batch with its own statistics, as in training, then with the moving ones; measure the layers."""
        calls: dict[LayerCall, Moments] = {}
        room = _KEPT_BYTES

        @np.errstate(all="ignore")  # values may not be finite
        def record(call: LayerCall, given: Input) -> Statistics:
            moments = given.moments()
            if moments.count:
                layer = self.layers[call.layer]
                single = layer.single_value_batches + int(moments.count == 1)
                self._set(call.layer, first_input=layer.first_input or moments, single_value_batches=single)
                calls[call] = merge([calls[call], moments]) if call in calls else moments
            return self._training_statistics(call, moments)

        for index, given in enumerate(self._bar.over(batches, "training and evaluation", None)):
            if index == 0 and self._sees_training:
                self._observe_training(given)
            size = len(tree.flatten(inputs_of(self._model, given))[0])
            self.sizes.append(size)
            by_batch = self._run(given, record)
            by_running = self._run(given, self._measuring(index, size))
            needed = sum(as_numpy(part).nbytes for part in tree.flatten(given))
            if room >= needed or not self._batches:
                room -= needed
                self._batches.append(given)
                self.by_batch.add(*by_batch)
                self.by_running.add(*by_running)
            else:
                room = -1  # the batches that are kept are the first ones
        for position, layer in enumerate(dict.fromkeys(call.layer for call in calls)):
            own = tuple(moments for call, moments in sorted(calls.items()) if call.layer == layer)
            self._set(layer, order=position, calls=own)

    def _observe_training(self, batch: Any) -> None:
        """Find the layers that the model calls in evaluation while it trains, as `base(x, training=False)` does."""
        variables = self._model.variables
        before = [as_numpy(variable) for variable in variables]
        try:
            with self._observer.installed():
                self._observer.start(lambda call, given: self._training_statistics(call, given.moments()))
                self._model(inputs_of(self._model, batch), training=True)
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
        for number in self._observer.calls:
            if number not in self._observer.trained:
                self._set(number, by_batch=False, updates_running=False)

    def again(
        self, statistics: Mapping[int, measured.Statistics | tuple[measured.Statistics, ...]], title: str
    ) -> Outcome:
        """Run the kept batches with other statistics in some layers; a tuple has one entry for each call of a layer."""
        outcome = Outcome()

        def choose(call: LayerCall, given: Input) -> Statistics:
            chosen = statistics.get(call.layer)
            if chosen is None:
                return self._moving[call.layer]
            if not isinstance(chosen, measured.Statistics):
                chosen = chosen[min(call.nth, len(chosen) - 1)]
            return Statistics(chosen.mean[0], chosen.var[0])

        for given in self._bar.over(self._batches, title, len(self._batches)):
            outcome.add(*self._run(given, choose))
        return outcome

    def _run(self, batch: Any, statistics_for: StatisticsFor) -> tuple[Array | None, float | None]:
        """Return the output and the loss of one batch."""
        with self._observer.installed():
            self._observer.start(statistics_for)
            returned = self._forward(self._model, batch)
        loss = None if self._loss is None else float(np.mean(as_numpy(self._loss(_target_of(batch), returned))))
        outputs = map(as_numpy, tree.flatten(returned))
        first = next((y for y in outputs if y.ndim and y.dtype.kind in _FLOATING), None)
        return None if first is None else features_of(first).astype(np.float64), loss

    def _training_statistics(self, call: LayerCall, moments: Moments) -> Statistics:
        if moments.count > 1 and self.layers[call.layer].by_batch:
            return Statistics(moments.mean, moments.var)
        return self._moving[call.layer]

    def _measuring(self, batch: int, size: int) -> StatisticsFor:
        """Return a function that measures the samples at the first call of each layer, and the moving statistics."""

        @np.errstate(all="ignore")
        def measure(call: LayerCall, given: Input) -> Statistics:
            moving = self._moving[call.layer]
            x = np.moveaxis(given.x.astype(np.float64), given.axis, 1)
            if call.nth == 0 and x.size and x.shape[0] % size == 0:
                z = x.reshape(size, x.shape[0] // size, x.shape[1], -1) - np.nan_to_num(moving.mean)[:, None]
                samples = self.layers[call.layer].samples or Samples()
                samples.add(z.mean((1, 3)), np.square(z).mean((1, 3)), batch)
                self._set(call.layer, samples=samples)
            return moving

        return measure


def _target_of(batch: Any) -> Any:
    """Return the second part of a tuple or list, as in `fit`, or else the batch itself."""
    return tree.map_structure(as_numpy, batch[1] if isinstance(batch, (tuple, list)) else batch)
