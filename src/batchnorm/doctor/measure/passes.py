"""The passes over the data: by the batch's statistics, by the running ones, and by the population's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from batchnorm.doctor.measure.effect import Outcome
from batchnorm.doctor.measure.layers import Layer, Precision, Samples, counted
from batchnorm.models.batches import Ambient, Batches, device_of, moved, samples_in
from batchnorm.models.inputs import Inputs
from batchnorm.models.memory import size_of
from batchnorm.models.observe import (
    LayerCall,
    Observer,
    Pass,
    Rows,
    Statistics,
    running_statistics,
    set_running_statistics,
)
from batchnorm.models.outputs import outputs
from batchnorm.models.progress import Bar
from batchnorm.moments import Moments

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[..., Any]

# What is kept of a sample's output; more features are thinned out evenly.
_KEPT_FEATURES = 1024
# Batches kept for the passes that need the population first.
_KEPT_BYTES = 2**30
# |mean| over deviation from which on the error is measured.
_FAR = 30.0


@dataclass
class Data:
    """The user's data and how the model is called with them."""

    forward: Forward
    loss: Loss | None
    batches: list[Any] = field(default_factory=list)
    samples: int = 0
    sizes: list[int] = field(default_factory=list)
    example: Inputs | None = None


def target_of(batch: Any) -> Any:
    """What the loss is given besides the output: the last part of a tuple, else the batch itself."""
    return batch[-1] if isinstance(batch, (tuple, list)) else batch


def result_of(returned: Any) -> Tensor | None:
    """The first floating-point tensor that the model returned: `[N, K]` as it is, all else as `[N, features, 1]`."""
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


class Passes:
    """Sends batches through a model whose layers are in evaluation, and says what they normalize by.

    Args:
        model: In evaluation; its running statistics are put back by the caller.
        layers: Those with running statistics.
        data: What to send.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], data: Data) -> None:
        self.model = model
        self.layers = layers
        self.data = data
        self.observer = Observer("diagnose", [layer.found for layer in layers])
        self._samples: tuple[int, int] | None = None  # number and size of the batch, while samples are looked at
        self._seen: set[int] = set()
        self._ambient = Ambient(None, device_of(model))

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = self.observer.install()
        for number, layer in enumerate(self.layers):
            handles.append(layer.module.register_forward_pre_hook(self._look(number), with_kwargs=True))
        handles.append(self.model.register_forward_pre_hook(self._take_example, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, batch: Any) -> tuple[Tensor | None, float | None]:
        """The output and the loss of one batch."""
        batch = pytree.tree_map_only(Tensor, torch.clone, batch)  # which models may change in place
        with self._ambient.entered():
            returned = self.data.forward(self.model, batch)
            loss = None if self.data.loss is None else float(self.data.loss(returned, target_of(batch)))
        return result_of(returned), loss

    def both(self, batches: Batches, bar: Bar, budget: int) -> tuple[Outcome, Outcome]:
        """Each batch by its own statistics, as in training, then by the running ones; the layers' fields are filled.

        Of the results those of the batches that are kept, which the other passes can be compared with. With the first
        batch the bar says how long all will take, up to `budget` more passes included.
        """
        by_batch, by_running = Outcome([], []), Outcome([], [])
        calls: dict[LayerCall, Moments] = {}
        device, room = device_of(self.model), _KEPT_BYTES

        def meet(call: LayerCall, rows: Rows) -> Statistics:
            layer = self.layers[call.layer]
            for moments in rows:
                if moments.count:
                    layer.first = layer.first or moments
                    calls[call] = calls.get(call, Moments.empty(len(moments.mean), device="cpu")).merge(moments)
                    layer.one_value += int(moments.count == 1)
            return self._own(call, rows)

        for number, given in enumerate(bar.over(batches, "training and evaluation", batches.length)):
            batch = moved(given, device)
            size = samples_in(batch)
            self.data.samples += size
            self.data.sizes.append(size)
            with self._watched():
                times = [time.perf_counter()]
                self.observer.current = Pass(meet)
                first = self._run(batch)
                self.observer.current = None
                self._put({})
                self._samples, self._seen = (number, size), set()
                times.append(time.perf_counter())
                second = self._run(batch)
                times.append(time.perf_counter())
                self._samples = None
            if number == 0:
                self._look_what_moved()
                # The model warms up in the one, and in the other what is measured once is measured.
                self._say_how_long(bar, batches.expected(size), min(times[1] - times[0], times[2] - times[1]), budget)
            if room >= size_of(given) or not self.data.batches:
                room -= size_of(given)
                self.data.batches.append(given)
                _add(by_batch, *first)
                _add(by_running, *second)
            else:
                room = -1  # the kept ones are the first
        order = list(dict.fromkeys(call.layer for call in calls))
        for number, layer in enumerate(self.layers):
            layer.order = order.index(number) if number in order else layer.order
            layer.calls = tuple(moments for call, moments in sorted(calls.items()) if call.layer == number)
        return by_batch, by_running

    @staticmethod
    def _say_how_long(bar: Bar, number: int | None, seconds: float, budget: int) -> None:
        """From the time of one batch."""
        if number is not None:
            least, most = (timedelta(seconds=round(number * seconds * passes)) for passes in (3, 3 + budget))
            text = f"{counted(number, 'batch')}: about {least}"
            single = counted(budget, "pass for a single layer", "passes for single layers")
            bar.expect(number, f"{text}, with {single} {most}" if budget else text)

    def again(self, statistics: Mapping[int, Statistics | tuple[Statistics, ...]], bar: Bar, title: str) -> Outcome:
        """The kept batches with other statistics in some layers, for each call of a layer where several are given."""
        outcome = Outcome([], [])
        device = device_of(self.model)
        self._put({number: s for number, s in statistics.items() if isinstance(s, Statistics)})
        by_call = {number: s for number, s in statistics.items() if not isinstance(s, Statistics)}

        def meet(call: LayerCall, rows: Rows) -> Statistics:
            if call.layer in by_call:
                several = by_call[call.layer]
                return several[min(call.nth, len(several) - 1)]
            chosen = statistics.get(call.layer, self.layers[call.layer].before)
            assert isinstance(chosen, Statistics)
            return chosen

        with self._watched() if by_call else nullcontext():
            for given in bar.over(self.data.batches, title, len(self.data.batches)):
                self.observer.current = Pass(meet)
                _add(outcome, *self._run(moved(given, device)))
            self.observer.current = None
        self._put({})
        return outcome

    def reshuffled(self, bar: Bar) -> Outcome | None:
        """The kept batches' samples by the statistics of other batches, drawn anew from all of them.

        Its outputs are those of the same samples as in the other passes, in their order. None where a batch is not made
        of tensors with one row for each sample.
        """
        kept = [moved(given, None) for given in self.data.batches]  # arrays as tensors
        sizes = [samples_in(given) for given in kept]
        leaves, specs = zip(*(pytree.tree_flatten(given) for given in kept), strict=True)
        pairs = [(leaf, size) for of, size in zip(leaves, sizes, strict=True) for leaf in of]
        rows = all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size for leaf, size in pairs)
        shapes = {tuple((leaf.shape[1:], leaf.dtype) for leaf in of) for of in leaves} if rows else set()
        if len(kept) < 2 or len(shapes) != 1 or any(spec != specs[0] for spec in specs):
            return None
        joined = [torch.cat(parts) for parts in zip(*leaves, strict=True)]
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
        device, outcome = device_of(self.model), Outcome([], [])
        with self._watched():
            for rows_of in bar.over(order.split(sizes), "the same samples in other batches", len(sizes)):
                self.observer.current = Pass(self._own)
                batch = pytree.tree_unflatten([leaf[rows_of.to(leaf.device)] for leaf in joined], specs[0])
                _add(outcome, *self._run(moved(batch, device)))
            self.observer.current = None
        self._put({})
        if any(len(y) != n for y, n in zip(outcome.outputs, sizes, strict=True)):
            return None
        outputs = torch.cat(outcome.outputs)[order.argsort()]
        return Outcome(list(outputs.split(sizes)), outcome.losses)

    def inputs(self, batch: Any, see: Callable[[int, Tensor], None]) -> None:
        """Show what each layer is given in its first call with a batch, each layer by the batch's statistics."""
        called: set[int] = set()

        def look(number: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else kwargs.get("input")
                if isinstance(x, Tensor) and number not in called and len(args) + len(kwargs) == 1:  # and no mask
                    called.add(number)
                    see(number, x.detach())

            return hook

        with self._watched():
            handles = [
                layer.module.register_forward_pre_hook(look(number), with_kwargs=True)
                for number, layer in enumerate(self.layers)
            ]
            try:
                self.observer.current = Pass(self._own)
                self._run(moved(batch, device_of(self.model)))
            finally:
                self.observer.current = None
                for handle in handles:
                    handle.remove()
        self._put({})

    def _own(self, call: LayerCall, rows: Rows) -> Statistics:
        """What training normalizes by: the batch's statistics, where the layer does so and there are any."""
        layer = self.layers[call.layer]
        assert layer.before is not None
        mean, var = layer.before.mean.clone(), layer.before.var.clone()
        for row, moments in enumerate(rows):
            if moments.count > 1 and layer.by_batch:
                mean[row], var[row] = moments.mean, moments.var
        return Statistics(mean, var)

    def _put(self, statistics: Mapping[int, Statistics]) -> None:
        """Give the layers these running statistics, and the others their own."""
        for number, layer in enumerate(self.layers):
            assert layer.before is not None
            set_running_statistics(layer.module, statistics.get(number, layer.before))

    def _look_what_moved(self) -> None:
        for layer in self.layers:
            pairs = zip(running_statistics(layer.module), layer.before or (), strict=True)
            layer.moved_in_evaluation = any(not torch.equal(now.cpu().nan_to_num(), t.nan_to_num()) for now, t in pairs)

    def _take_example(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.data.example is None:
            self.data.example = Inputs(args, kwargs).first(2).map(torch.clone)

    def _look(self, number: int) -> Callable[..., None]:
        layer = self.layers[number]

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if self._samples is None or number in self._seen or not isinstance(x, Tensor) or layer.before is None:
                return
            self._seen.add(number)
            batch, size = self._samples
            if x.numel():
                largest = x.detach().abs().max()
                layer.largest = largest if layer.largest is None else torch.maximum(layer.largest, largest)
            if x.shape[0] % size or x.numel() == 0 or len(layer.before.mean) != 1:
                return
            pivot = layer.before.mean[0].nan_to_num().to(x.device)
            z = x.detach().double().reshape(size, x.shape[0] // size, x.shape[1], -1) - pivot[:, None]
            u, v = z.mean((1, 3)), z.square().mean((1, 3))
            layer.samples = layer.samples or Samples()
            layer.samples.add(u, v, batch)
            if layer.precision is None:
                layer.precision = _precision(x.detach(), layer.eps)

        return hook


def _add(outcome: Outcome, result: Tensor | None, loss: float | None) -> None:
    if result is not None:
        outcome.outputs.append(result)
    if loss is not None:
        outcome.losses.append(loss)


def _precision(x: Tensor, eps: float) -> Precision:
    dims = [0, *range(2, x.dim())]
    exact = x.double()
    mean = exact.mean(dims, keepdim=True)
    deviation = ((exact - mean).square().mean(dims, keepdim=True) + eps).sqrt()
    ratio = (mean.abs() / deviation).flatten()
    channel = int(ratio.nan_to_num(0.0).argmax())
    largest = float(ratio[channel])
    given = largest * torch.finfo(x.dtype).eps / 2 / 3**0.5
    computed = 0.0
    if largest > _FAR and x.numel() > x.shape[1]:
        y = F.batch_norm(x, None, None, None, None, True, 0.0, eps).double()
        error = (y - (exact - mean) / deviation).square().mean(dims).sqrt()
        computed = float(error.max())
    return Precision(largest, channel, x.dtype, given, computed)
