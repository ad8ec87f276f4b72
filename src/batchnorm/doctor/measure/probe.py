"""What is measured once, and what the rules ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.measure.between import Spread, between_batches
from batchnorm.doctor.measure.dropped import dropped
from batchnorm.doctor.measure.effect import Effect, Outcome, effect
from batchnorm.doctor.measure.layers import Layer, Off, layers_of, off
from batchnorm.doctor.measure.passes import Data, Passes
from batchnorm.doctor.measure.ranks import Ranks
from batchnorm.doctor.measure.step import Step, StepError, step
from batchnorm.models.batches import Batches, device_of, moved
from batchnorm.models.errors import Untraceable
from batchnorm.models.inputs import Inputs
from batchnorm.models.lowering import lower
from batchnorm.models.model_graph import Trace, trace
from batchnorm.models.neighbours import batch_norm_calls
from batchnorm.models.observe import Statistics
from batchnorm.models.progress import Bar
from batchnorm.walk import set_mode

# Samples that the test of independence looks at: its time grows with them, and it needs no more.
_TESTED = 2048
# Change of a deviation by what is random in training that is more than rounding and chance.
_RANDOM = 0.1


@dataclass
class Probe:
    """Everything that the rules look at; made and used while the model's state is kept by the caller.

    Attributes:
        model: The user's, without wrappers.
        optimizer: The user's, if there is one.
        layers: Every layer of batch normalization.
        trains: Whether any parameter requires a gradient.
        training: Whether the model was in training.
        budget: How many more passes over the data rules may ask for.
        bar: Shows how far it is.
        missing: What rules may need and is not there, with the reason.
        processes: How many train the model together.
        ranks: What each of them holds.
        dropped: The layers that dropout comes right before, and its share, where the trace shows it.
        found: What the rules before found.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    layers: list[Layer]
    trains: bool
    training: bool
    budget: int
    bar: Bar
    missing: dict[str, str] = field(default_factory=dict)
    data: Data | None = None
    step: Step | None = None
    trace: Trace | None = None
    by_batch: Outcome | None = None
    by_running: Outcome | None = None
    by_population: Outcome | None = None
    processes: int = 1
    ranks: Ranks | None = None
    dropped: dict[nn.Module, float] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)
    _passes: Passes | None = None

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None, budget: int, bar: Bar) -> Probe:
        """From the model alone."""
        trains = any(p.requires_grad for p in model.parameters())
        probe = cls(model, optimizer, layers_of(model), trains, model.training, budget, bar)
        if optimizer is None:
            probe.missing["optimizer"] = "needs the optimizer (optimizer=)"
        if budget < 1:
            probe.missing["pass"] = "needs one more pass over the data (budget=1)"
        for need in ("data", "step"):
            probe.missing[need] = "needs data (data=)"
        return probe

    @property
    def measured(self) -> list[Layer]:
        """The layers whose running statistics can be measured."""
        return [layer for layer in self.layers if layer.before is not None]

    def compare(self, group: Any) -> None:
        """See what the other processes of a group hold; each of them has to call this."""
        self.ranks = Ranks.gather(self.layers, group)

    def measure(self, data: Data, batches: Batches) -> None:
        """Send the data through, in three passes, and make a training step."""
        self.data = data
        self._passes = Passes(self.model, self.measured, data)
        training = {module: module.training for module in self.model.modules()}
        set_mode(self.model, training=False)
        self.by_batch, self.by_running = self._passes.both(batches, self.bar, self.budget)
        if data.samples == 0:
            raise ValueError("diagnose expects at least one batch, got data that end at once. Pass more data.")
        del self.missing["data"]
        if not self.by_running.outputs:
            self.missing["output"] = "the model returns no floating-point tensor to compare"
        elif not (self.by_batch.finite and self.by_running.finite):
            self.missing["output"] = "the model's output or loss is not finite on these data"
        elif self.by_batch.shapes != self.by_running.shapes:
            self.missing["output"] = "the model's output has another shape in each pass"
        else:
            self.by_population = self._passes.again(self._population(), self.bar, "population statistics")
        for module, mode in training.items():
            module.training = mode
        self._step()
        set_mode(self.model, training=False)

    def _step(self) -> None:
        assert self.data is not None
        if not self.trains:
            self.missing["step"] = "no parameter requires a gradient, so that there is no training step"
            return
        try:
            batch = moved(self.data.batches[0], device_of(self.model))
            self.step = step(self.model, self.layers, self.data, batch)
            del self.missing["step"]
        except StepError as error:
            self.missing["step"] = f"needs a training step, and {error}"

    def look(self, example: Inputs | None) -> None:
        """Trace the model, so that each layer's place is known."""
        if example is None:
            self.missing["trace"] = "needs data, to see how the model is called (data=)"
            return
        try:
            self.trace = trace(self.model, example, prepare=self._prepared)
        except Untraceable as error:
            self.missing["trace"] = f"needs to trace the model, which failed: {error}"
            return
        calls = {call.path: call for call in reversed(batch_norm_calls(self.trace))}
        for layer in self.layers:
            layer.place = next((calls[path] for path in layer.found.paths if path in calls), None)

    def _prepared(self, module: fx.GraphModule) -> fx.GraphModule:
        self.dropped |= dropped(module, {layer.module for layer in self.layers})  # lowering takes dropout away
        return lower(module)

    # What rules ask for ---------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> float:
        """The usual one of the data."""
        assert self.data is not None
        return float(median(self.data.sizes))

    @cached_property
    def gap(self) -> Effect | None:
        """What evaluation has more than training, on the same batches."""
        return self._effect(self.by_running, self.by_batch)

    @cached_property
    def off_by(self) -> Effect | None:
        """What the running statistics have more than the population's."""
        return self._effect(self.by_running, self.by_population)

    @cached_property
    def batch_effect(self) -> Effect | None:
        """What the batches' statistics have more than the population's."""
        return self._effect(self.by_batch, self.by_population)

    @staticmethod
    def _effect(of: Outcome | None, against: Outcome | None) -> Effect | None:
        if of is None or against is None or not (of.finite and against.finite) or of.shapes != against.shapes:
            return None
        return effect(of, against)

    @cached_property
    def off(self) -> list[Off]:
        """How far each layer's running statistics are off the population, in the model's order."""
        if self.data is None:
            return []
        samples, size = self.data.samples, self.batch_size
        return [found for layer in self.measured if (found := off(layer, samples, size)) is not None]

    @cached_property
    def noise(self) -> dict[Layer, float]:
        """Deviation of a normalized value of the median channel by the rest of its batch, where that can be said."""
        noise = {
            layer: float(layer.samples.noise(self.batch_size, layer.eps).median())
            for layer in self.measured
            if layer.samples is not None and layer.by_batch
        }
        return {layer: value for layer, value in noise.items() if math.isfinite(value)}

    @cached_property
    def random_scale(self) -> dict[Layer, float]:
        """Deviation of the layers' inputs in training over that without dropout, on one batch, where they differ."""
        found = {}
        for number, layer in enumerate(self.layers):
            given = None if self.step is None else self.step.given.get(number)
            if given is None or layer.first is None or given.count != layer.first.count:
                continue
            ratio = (given.var.cpu() + layer.eps) / (layer.first.var.cpu() + layer.eps)
            scale = float(ratio.median().sqrt())
            if abs(scale - 1) > _RANDOM:
                found[layer] = scale
        return found

    @cached_property
    def spread(self) -> Spread | None:
        """Whether the batches' samples are drawn independently."""
        layers = [layer for layer in self.measured if layer.samples is not None]
        if self.data is None or len(self.data.sizes) < 2 or not layers:
            return None
        first = next(layer.samples for layer in layers if layer.samples is not None)
        kept = [torch.cat(layer.samples.kept) for layer in layers if layer.samples is not None]
        values = torch.cat([values for values in kept if len(values) == len(first.batch)], 1)[:_TESTED]
        return between_batches(values.double().nan_to_num(0.0, 0.0, 0.0), torch.tensor(first.batch[:_TESTED]))

    def lacks(self, need: str) -> str | None:
        """Why it has nothing of what a rule needs, such as "data" or "step or trace"; None where it has."""
        reasons = [self.missing.get(one) for one in need.split(" or ")]
        return None if None in reasons else reasons[0]

    def tensor(self, argument: object) -> Tensor | None:
        """What an argument of a traced call is, if it is a parameter or buffer."""
        if self.trace is None or not isinstance(argument, Node) or argument.op != "get_attr":
            return None
        held: Any = self.trace.module
        for name in str(argument.target).split("."):
            held = getattr(held, name)
        return held if isinstance(held, Tensor) else None

    def explained(self, layers: Collection[Layer]) -> Effect | None:
        """What is left of `off_by` with the population's statistics in these layers; None where no pass is left."""
        outcome = self._extra(
            {number: s for number, s in self._population().items() if self.measured[number] in layers},
            "one layer's statistics",
        )
        return self._effect(outcome, self.by_population)

    def apart(self, layer: Layer) -> Effect | None:
        """What pooled statistics of a layer's calls have more than statistics for each call."""
        each: dict[int, Statistics | tuple[Statistics, ...]] = dict(self._population())
        each[self.measured.index(layer)] = tuple(
            Statistics(moments.mean[None], moments.var_unbiased[None]) for moments in layer.calls
        )
        return self._effect(self.by_population, self._extra(each, "statistics for each call"))

    @cached_property
    def neighbours(self) -> Effect | None:
        """What the samples' results have more by the statistics of other batches; None where no pass is left."""
        if self._passes is None or self.by_batch is None or self.budget < 1:
            return None
        self.budget -= 1
        return self._effect(self._passes.reshuffled(self.bar), self.by_batch)

    def inputs(self, batch: Any, see: Callable[[Layer, Tensor], None]) -> None:
        """Show what each measured layer is given, in its first call with the batch."""
        assert self._passes is not None
        self._passes.inputs(batch, lambda number, x: see(self.measured[number], x))

    def _extra(self, statistics: Any, title: str) -> Outcome | None:
        if self._passes is None or self.by_population is None or self.budget < 1:
            return None
        self.budget -= 1
        return self._passes.again(statistics, self.bar, title)

    def _population(self) -> dict[int, Statistics]:
        found = {}
        for number, layer in enumerate(self.measured):
            population = layer.population
            if population is not None and layer.before is not None and len(layer.before.mean) == 1:
                found[number] = Statistics(population.mean[None], population.var_unbiased[None])
        return found
