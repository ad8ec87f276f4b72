"""The passes over the data: normalized by the batch, by the running statistics, and by the population's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.doctor.measure.effect import Outcome, features_of
from batchnorm.doctor.measure.layers import Array, HalfInput, Layer, Precision, Samples, Statistics
from batchnorm.doctor.measure.padding import PaddingEffect
from batchnorm.doctor.measure.runs import Runs
from batchnorm.doctor.pytorch.layers import as_array, as_moments, torch_statistics
from batchnorm.doctor.pytorch.padding import find_padding
from batchnorm.doctor.wording import counted
from batchnorm.models.data.batches import Batches, ThreadSettings, as_tensors, device_of, own_copy, size_of
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.data.outputs import outputs
from batchnorm.models.data.samples import samples_in
from batchnorm.models.execution import observe
from batchnorm.models.execution.calling import DefaultForward, StepResult, arguments_of_loss, loss_in
from batchnorm.models.execution.observe import LayerCall, Observer, Pass, Rows, put_running_statistics
from batchnorm.models.execution.progress import Bar
from batchnorm.moments import Moments
from batchnorm.nn.layer import channels_second
from batchnorm.walk import norm_layers

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[..., Any]

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
        kept: The batches that are kept for the later passes.
        example: The arguments of the model's first call.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], call: ModelCall, budget: int, bar: Bar) -> None:
        super().__init__(layers, budget)
        self.model = model
        self.call = call
        self.bar = bar
        self.kept: list[Any] = []
        self.example: Inputs | None = None
        paths = {layer.path for layer in layers}
        found = [each for each in norm_layers(model) if each.path in paths]
        self.observer = Observer("diagnose", found)
        self._modules = [each.module for each in found]
        self._running = [torch_statistics(layer.running) for layer in layers if layer.running is not None]
        self._largest: dict[int, Tensor] = {}  # largest |x| of each layer's input
        self._batch: tuple[int, int] | None = None  # number and size of the batch, while its samples are measured
        self._done: set[int] = set()  # layers that were measured in this batch
        self._ambient = ThreadSettings(None, device_of(model))

    @contextmanager
    def _hooked(self, hook_of: Callable[[int], Callable[..., None]] | None = None) -> Iterator[None]:
        """Observe the layers, with a hook on each; by default, the hook measures the layer's input."""
        handles = self.observer.install()
        for number, module in enumerate(self._modules):
            hook = (hook_of or self._measure_input)(number)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        handles.append(self.model.register_forward_pre_hook(self._take_example, with_kwargs=True))
        try:
            yield
        finally:
            self.observer.current = None
            for handle in handles:
                handle.remove()

    def _run(self, batch: Any) -> tuple[Array | None, float | None]:
        """Return the output and the loss of one batch."""
        batch = own_copy(batch, device_of(self.model))
        with self._ambient.entered():
            returned = self.call.forward(self.model, batch)
            loss = self.call.loss_of(returned, batch)
        self.loss_source = self.call.source_of_loss(returned)
        return _output_of(returned), None if loss is None else float(loss)

    def first(self, batches: Batches) -> None:
        """Run each batch with its own statistics, as in training, then with the running ones; measure the layers.

        After the first batch, the bar shows the expected total time, including the budget.
        """
        calls: dict[LayerCall, Moments] = {}
        room = _KEPT_BYTES

        def record(call: LayerCall, rows: Rows) -> observe.Statistics:
            for moments in rows:
                if moments.count:
                    layer = self.layers[call.layer]
                    single = layer.single_value_batches + int(moments.count == 1)
                    first = layer.first_input or as_moments(moments)
                    self._set(call.layer, first_input=first, single_value_batches=single)
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
            own = tuple(as_moments(moments) for call, moments in sorted(calls.items()) if call.layer == number)
            self._set(number, order=position, calls=own)
        for number, largest in self._largest.items():
            self._set(number, half_input=_half_input(largest))

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
        common = {number: torch_statistics(s) for number, s in statistics.items() if isinstance(s, Statistics)}
        by_call = {
            n: [torch_statistics(each) for each in s] for n, s in statistics.items() if not isinstance(s, Statistics)
        }
        self._put(common)

        def choose(call: LayerCall, rows: Rows) -> observe.Statistics:
            if call.layer in by_call:
                several = by_call[call.layer]
                return several[min(call.nth, len(several) - 1)]
            return common.get(call.layer, self._running[call.layer])

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
        in_order = np.concatenate(outcome.outputs)[order.argsort().numpy()]
        return Outcome(np.split(in_order, np.cumsum(sizes)[:-1]), outcome.losses)

    def padding(self) -> PaddingEffect | None:
        """Measure the input of each layer with and without padding; None if the data have no padding."""
        padded = find_padding(self.kept)
        if padded is None:
            return None
        shifts: dict[str, float] = {}

        def compare(layer: Layer, x: Tensor) -> None:
            shift = padded.shift(x, layer.eps) if layer.by_batch else None
            if shift is not None:
                shifts[layer.path] = shift

        self._show_inputs(padded.batch, compare)
        return PaddingEffect(padded.share, padded.ends, shifts)

    def _show_inputs(self, batch: Any, show: Callable[[Layer, Tensor], None]) -> None:
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

    def _training_statistics(self, call: LayerCall, rows: Rows) -> observe.Statistics:
        """Return the statistics that training normalizes by: the batch's, if the layer uses them and they exist."""
        mean, var = (statistic.clone() for statistic in self._running[call.layer])
        for row, moments in enumerate(rows):
            if moments.count > 1 and self.layers[call.layer].by_batch:
                mean[row], var[row] = moments.mean, moments.var
        return observe.Statistics(mean, var)

    def _put(self, statistics: Mapping[int, observe.Statistics]) -> None:
        """Give the layers these running statistics, and all others their own."""
        for number, (module, own) in enumerate(zip(self._modules, self._running, strict=True)):
            put_running_statistics(module, statistics.get(number, own))

    def _find_moved(self) -> None:
        for number, (module, own) in enumerate(zip(self._modules, self._running, strict=True)):
            pairs = zip(observe.running_statistics(module), own, strict=True)
            moved = any(not torch.equal(now.cpu().nan_to_num(), t.nan_to_num()) for now, t in pairs)
            self._set(number, moved_in_evaluation=moved)

    def _take_example(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.example is None:
            self.example = Inputs(args, kwargs).map(torch.clone)

    def _measure_input(self, number: int) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(module, args, kwargs)
            if self._batch is None or number in self._done or x is None:
                return
            self._done.add(number)
            if x.numel() == 0:
                return
            largest, before = x.detach().abs().max(), self._largest.get(number)
            self._largest[number] = largest if before is None else torch.maximum(before, largest)
            layer, running, (batch, size) = self.layers[number], self._running[number], self._batch
            if x.shape[0] % size or len(running.mean) != 1:
                return
            pivot = running.mean[0].nan_to_num().to(x.device)
            z = x.detach().double().reshape(size, x.shape[0] // size, x.shape[1], -1) - pivot[:, None]
            samples = layer.samples or Samples()
            samples.add(as_array(z.mean((1, 3))), as_array(z.square().mean((1, 3))), batch)
            self._set(number, samples=samples, precision=layer.precision or _precision(x.detach(), layer.eps))

        return hook


def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that a layer is called with, as `[N, C, *S]`."""
    x = args[0] if args else kwargs.get("input")
    return channels_second(layer, x) if isinstance(x, Tensor) else None


def _output_of(returned: Any) -> Array | None:
    """Return the features of the first floating-point tensor of an output."""
    tensors = (y for y in outputs(returned) if y.is_floating_point() and y.dim())
    first = next(tensors, None)
    return None if first is None else as_array(features_of(first.detach()))


def _half_input(largest: Tensor) -> HalfInput | None:
    """Return the range of an input in half precision, from the largest |x| in its dtype; None in any other dtype."""
    if largest.dtype not in (torch.float16, torch.bfloat16):
        return None
    limits = torch.finfo(largest.dtype)
    return HalfInput(float(largest), limits.max, limits.dtype)


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
    return Precision(largest, channel, str(x.dtype).removeprefix("torch."), input_error, computed_error)
