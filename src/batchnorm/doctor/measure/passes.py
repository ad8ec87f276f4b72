"""The passes over the data: normalized by the batch, by the running statistics, and by the population's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.doctor.measure.effect import Outcome
from batchnorm.doctor.measure.layers import Layer, Precision, Samples
from batchnorm.doctor.measure.runs import Runs
from batchnorm.doctor.wording import counted
from batchnorm.models.data.batches import Batches, ThreadSettings, as_tensors, device_of, own_copy, size_of
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.data.outputs import outputs
from batchnorm.models.data.samples import samples_in
from batchnorm.models.execution.calling import DefaultForward, StepResult, arguments_of_loss, loss_in
from batchnorm.models.execution.observe import (
    LayerCall,
    Observer,
    Pass,
    Rows,
    Statistics,
    put_running_statistics,
    running_statistics,
)
from batchnorm.models.execution.progress import Bar
from batchnorm.moments import Moments
from batchnorm.nn.layer import channels_second

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[..., Any]

# Largest number of features that are kept of a sample's output; a larger output is sampled evenly.
_KEPT_FEATURES = 1024
# Memory for the batches that are kept for the later passes.
_KEPT_BYTES = 2**30
# From this |mean| over deviation, the error of the computation is measured.
_CANCELS = 30.0


@dataclass(frozen=True)
class ModelCall:
    """How to call the model with a batch, and how to compute the loss of its output, if the model does not."""

    forward: Forward
    loss: Loss | None = None

    def loss_of(self, returned: Any, batch: Any) -> Tensor | None:
        """Return the loss of what the model returned for the batch; None if nothing computes one."""
        if self.loss is None:
            return loss_in(returned)
        loss: Tensor = self.loss(*arguments_of_loss(self.loss, returned, batch))
        return loss

    def source_of_loss(self, returned: Any) -> str:
        """Return where the model's own loss comes from, or why there is none; empty if the user gave one."""
        if self.loss is not None:
            return ""
        if loss_in(returned) is not None:
            return f"from {returned.step}" if isinstance(returned, StepResult) else "from the model's output"
        return self.forward.problem if isinstance(self.forward, DefaultForward) else ""

    def settle(self, model: nn.Module, batch: Any) -> None:
        """Find out how the model is called, before its layers are observed."""
        if isinstance(self.forward, DefaultForward):
            self.forward.settle(model, batch)


class Passes(Runs):
    """Passes of a model in evaluation mode.

    Args:
        model: The model, in evaluation. The caller restores its running statistics.
        layers: The layers with running statistics.
        call: How the model is called.
        budget: Number of further passes for single layers.
        bar: Shows the progress.

    Attributes:
        example: The arguments of the model's first call.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], call: ModelCall, budget: int, bar: Bar) -> None:
        super().__init__(layers, budget)
        self.model = model
        self.call = call
        self.bar = bar
        self.kept: list[Any] = []
        self.example: Inputs | None = None
        self.observer = Observer("diagnose", [layer.found for layer in layers])
        self._batch: tuple[int, int] | None = None  # number and size of the batch, while its samples are measured
        self._done: set[int] = set()  # layers that were measured in this batch
        self._ambient = ThreadSettings(None, device_of(model))

    @contextmanager
    def _hooked(self, hook_of: Callable[[int], Callable[..., None]] | None = None) -> Iterator[None]:
        """Observe the layers, with a hook on each; by default, the hook measures the layer's input."""
        handles = self.observer.install()
        for number, layer in enumerate(self.layers):
            hook = (hook_of or self._measure_input)(number)
            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(self.model.register_forward_pre_hook(self._take_example, with_kwargs=True))
        try:
            yield
        finally:
            self.observer.current = None
            for handle in handles:
                handle.remove()

    def _run(self, batch: Any) -> tuple[Tensor | None, float | None]:
        """Return the output and the loss of one batch."""
        batch = own_copy(batch, device_of(self.model))
        with self._ambient.entered():
            returned = self.call.forward(self.model, batch)
            loss = self.call.loss_of(returned, batch)
        self.loss_source = self.call.source_of_loss(returned)
        return output_of(returned), None if loss is None else float(loss)

    def first(self, batches: Batches) -> None:
        """Run each batch with its own statistics, as in training, then with the running ones; measure the layers.

        After the first batch, the bar shows the expected total time, including the budget.
        """
        calls: dict[LayerCall, Moments] = {}
        room = _KEPT_BYTES

        def record(call: LayerCall, rows: Rows) -> Statistics:
            for moments in rows:
                if moments.count:
                    layer = self.layers[call.layer]
                    single = layer.single_value_batches + int(moments.count == 1)
                    self._set(call.layer, first_input=layer.first_input or moments, single_value_batches=single)
                    calls[call] = calls.get(call, Moments.empty(len(moments.mean), device="cpu")).merge(moments)
            return self._training_statistics(call, rows)

        for number, given in enumerate(self.bar.over(batches, "training and evaluation", batches.length)):
            if number == 0:
                with self._ambient.entered():
                    self.call.settle(self.model, own_copy(given, device_of(self.model)))
            with self._hooked():
                times = [time.perf_counter()]
                self.observer.current = by_its_own = Pass(record)
                by_batch = self._run(given)
                self.observer.current = None
                self._put({})
                batches.shape = by_its_own.shape
                size = samples_in(given, by_its_own.shape)
                self.sizes.append(size)
                self._batch, self._done = (number, size), set()
                times.append(time.perf_counter())
                by_running = self._run(given)
                times.append(time.perf_counter())
                self._batch = None
            if number == 0:
                self._find_moved()
                # The first run warms the model up. The second run includes the measurements that are made once.
                seconds = min(times[1] - times[0], times[2] - times[1])
                self._announce(batches.expected(size), seconds)
            if room >= size_of(given) or not self.kept:
                room -= size_of(given)
                self.kept.append(given)
                self.by_batch.add(*by_batch)
                self.by_running.add(*by_running)
            else:
                room = -1  # the batches that are kept are the first ones
        order = list(dict.fromkeys(call.layer for call in calls))
        for position, number in enumerate(order):
            own = tuple(moments for call, moments in sorted(calls.items()) if call.layer == number)
            self._set(number, order=position, calls=own)

    def _announce(self, number: int | None, seconds: float) -> None:
        """Show the expected total time, from the time of one batch."""
        if number is not None:
            least, most = (timedelta(seconds=round(number * seconds * passes)) for passes in (3, 3 + self.budget))
            text = f"{counted(number, 'batch')}: about {least}"
            single = counted(self.budget, "pass for a single layer", "passes for single layers")
            self.bar.expect(number, f"{text}, with {single} {most}" if self.budget else text)

    def again(self, statistics: Mapping[int, Statistics | tuple[Statistics, ...]], title: str) -> Outcome:
        """Run the kept batches with other statistics in some layers; a tuple has one entry for each call of a layer."""
        outcome = Outcome()
        self._put({number: s for number, s in statistics.items() if isinstance(s, Statistics)})
        by_call = {number: s for number, s in statistics.items() if not isinstance(s, Statistics)}

        def choose(call: LayerCall, rows: Rows) -> Statistics:
            if call.layer in by_call:
                several = by_call[call.layer]
                return several[min(call.nth, len(several) - 1)]
            chosen = statistics.get(call.layer, self.layers[call.layer].running)
            assert isinstance(chosen, Statistics)
            return chosen

        with self._hooked() if by_call else nullcontext():
            for given in self.bar.over(self.kept, title, len(self.kept)):
                self.observer.current = Pass(choose)
                outcome.add(*self._run(given))
        self._put({})
        return outcome

    def reshuffled(self) -> Outcome | None:
        """Run the samples of the kept batches in new random batches, each normalized by its own statistics.

        The outputs are in the order of the other passes. Return None if a batch does not consist of tensors with one
        row per sample.
        """
        kept = [as_tensors(given) for given in self.kept]
        sizes = self.sizes[: len(kept)]
        leaves, specs = zip(*(pytree.tree_flatten(given) for given in kept), strict=True)
        pairs = [(leaf, size) for of, size in zip(leaves, sizes, strict=True) for leaf in of]
        rows = all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size for leaf, size in pairs)
        shapes = {tuple((leaf.shape[1:], leaf.dtype) for leaf in of) for of in leaves} if rows else set()
        if len(kept) < 2 or len(shapes) != 1 or any(spec != specs[0] for spec in specs):
            return None
        joined = [torch.cat(parts) for parts in zip(*leaves, strict=True)]
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0), device="cpu")
        outcome = Outcome()
        with self._hooked():
            for chosen in self.bar.over(order.split(sizes), "the same samples in other batches", len(sizes)):
                self.observer.current = Pass(self._training_statistics)
                batch = pytree.tree_unflatten([leaf[chosen.to(leaf.device)] for leaf in joined], specs[0])
                outcome.add(*self._run(batch))
        self._put({})
        if any(len(y) != n for y, n in zip(outcome.outputs, sizes, strict=True)):
            return None
        in_order = torch.cat(outcome.outputs)[order.argsort()]
        return Outcome(list(in_order.split(sizes)), outcome.losses)

    def show_inputs(self, batch: Any, show: Callable[[Layer, Tensor], None]) -> None:
        """Run a batch with its own statistics, and show each layer's input in its first call without a mask."""
        shown: set[int] = set()

        def hook_of(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = input_of(module, args, kwargs)
                if x is not None and number not in shown and len(args) + len(kwargs) == 1:
                    shown.add(number)
                    show(self.layers[number], x.detach())

            return hook

        with self._hooked(hook_of):
            self.observer.current = Pass(self._training_statistics)
            self._run(batch)
        self._put({})

    def _training_statistics(self, call: LayerCall, rows: Rows) -> Statistics:
        """Return the statistics that training normalizes by: the batch's, if the layer uses them and they exist."""
        layer = self.layers[call.layer]
        assert layer.running is not None
        mean, var = layer.running.mean.clone(), layer.running.var.clone()
        for row, moments in enumerate(rows):
            if moments.count > 1 and layer.by_batch:
                mean[row], var[row] = moments.mean, moments.var
        return Statistics(mean, var)

    def _put(self, statistics: Mapping[int, Statistics]) -> None:
        """Give the layers these running statistics, and all others their own."""
        for number, layer in enumerate(self.layers):
            assert layer.running is not None
            put_running_statistics(layer.module, statistics.get(number, layer.running))

    def _find_moved(self) -> None:
        for number, layer in enumerate(self.layers):
            pairs = zip(running_statistics(layer.module), layer.running or (), strict=True)
            moved = any(not torch.equal(now.cpu().nan_to_num(), t.nan_to_num()) for now, t in pairs)
            self._set(number, moved_in_evaluation=moved)

    def _set(self, number: int, **changes: Any) -> None:
        self.layers[number] = replace(self.layers[number], **changes)

    def _take_example(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.example is None:
            self.example = Inputs(args, kwargs).map(torch.clone)

    def _measure_input(self, number: int) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer, x = self.layers[number], input_of(module, args, kwargs)
            if self._batch is None or number in self._done or x is None or layer.running is None:
                return
            self._done.add(number)
            batch, size = self._batch
            if x.numel():
                largest, before = x.detach().abs().max(), layer.largest_input
                self._set(number, largest_input=largest if before is None else torch.maximum(before, largest))
            if x.shape[0] % size or x.numel() == 0 or len(layer.running.mean) != 1:
                return
            pivot = layer.running.mean[0].nan_to_num().to(x.device)
            z = x.detach().double().reshape(size, x.shape[0] // size, x.shape[1], -1) - pivot[:, None]
            u, v = z.mean((1, 3)), z.square().mean((1, 3))
            samples = layer.samples or Samples()
            samples.add(u, v, batch)
            self._set(number, samples=samples, precision=layer.precision or _precision(x.detach(), layer.eps))

        return hook


def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer is called with, as `[N, C, *S]`."""
    x = args[0] if args else kwargs.get("input")
    return channels_second(layer, x) if isinstance(x, Tensor) else None


def output_of(returned: Any) -> Tensor | None:
    """Return the first floating-point tensor of an output: `[N, K]` unchanged, any other as `[N, features, 1]`."""
    for tensor in outputs(returned):
        if tensor.is_floating_point() and tensor.dim():
            if tensor.dim() == 2 and tensor.shape[1] <= _KEPT_FEATURES:
                return tensor.detach().double().cpu()
            flat = tensor.detach().reshape(tensor.shape[0], -1, 1)
            if flat.shape[1] > _KEPT_FEATURES:
                every = torch.linspace(0, flat.shape[1] - 1, _KEPT_FEATURES, device=flat.device).long()
                flat = flat[:, every]
            return flat.double().cpu()
    return None


def _precision(x: Tensor, eps: float) -> Precision:
    dims = [0, *range(2, x.dim())]
    exact = x.double()
    mean = exact.mean(dims, keepdim=True)
    deviation = ((exact - mean).square().mean(dims, keepdim=True) + eps).sqrt()
    ratio = (mean.abs() / deviation).flatten()
    channel = int(ratio.nan_to_num(0.0).argmax())
    largest = float(ratio[channel])
    input_error = largest * torch.finfo(x.dtype).eps / 2 / 3**0.5
    computed_error = 0.0
    if largest > _CANCELS and x.numel() > x.shape[1]:
        y = F.batch_norm(x, None, None, None, None, True, 0.0, eps).double()
        error = (y - (exact - mean) / deviation).square().mean(dims).sqrt()
        computed_error = float(error.max())
    return Precision(largest, channel, x.dtype, input_error, computed_error)
