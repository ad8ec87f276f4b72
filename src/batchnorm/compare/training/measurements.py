"""Measurements during training: times, evaluations, gradients, kept memory, activations and layers."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from batchnorm import walk
from batchnorm.compare.inputs.data import Data
from batchnorm.compare.inputs.norms import Norm
from batchnorm.compare.records import Evaluation, Histogram, Layer, finite

BINS = 64
PERCENTILES = (15, 50, 85)
TEST_BATCH = 1000


class Stopwatch:
    """A clock that sums the time between `start` and `stop`, without the time inside `paused`.

    Args:
        device: Device that does the work; each reading waits until its pending work is finished.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.seconds = 0.0
        self._since = 0.0
        self._device = device if device is not None and device.type != "cpu" else None

    def start(self) -> None:
        """Start the clock."""
        self._since = self._now()

    def stop(self) -> None:
        """Stop the clock."""
        self.seconds += self._now() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock during the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _now(self) -> float:
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def evaluate(network: nn.Module, data: Data, step: int, train_seconds: float) -> Evaluation:
    """Return loss and accuracy on the whole test set and on `data.train_part`.

    The network is in training mode afterwards.
    """
    network.eval()
    try:
        with torch.no_grad():
            test = _loss_and_accuracy(network, data.x_test, data.y_test)
            train = _loss_and_accuracy(network, *data.train_part)
    finally:
        network.train()
    return Evaluation(step, train_seconds, *test, *train)


def _loss_and_accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float | None, float]:
    loss, right = 0.0, 0
    for x, y in zip(inputs.split(TEST_BATCH), labels.split(TEST_BATCH), strict=True):
        scores = network(x.clone())  # it may write into its input
        loss += float(F.cross_entropy(scores, y, reduction="sum"))
        right += int((scores.argmax(1) == y).sum())
    return finite(loss / len(labels)), right / len(labels)


def gradient_norm(network: nn.Module) -> float | None:
    """Return the ℓ2 norm of the gradient over all parameters; None if it is not finite."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return finite(float(nn.utils.get_total_norm(gradients)))


def kept_bytes(network: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the number of bytes that a training step keeps for its backward pass.

    The number is the size of all storages that autograd saves, without the network's parameters and buffers. Unlike the
    memory of the process, it is the same on every machine, and it depends on the normalization.

    Args:
        network: In training mode. Its buffers and the random state are restored.
        x: One batch `[N, *in_shape]`.
        y: int64 `[N]`, its labels.
    """
    x, y = x.clone(), y.clone()  # they may be views of larger storages
    own = {_storage(tensor)[0] for tensor in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        address, size = _storage(tensor)
        if address not in own:
            saved[address] = size
            held.append(tensor)  # keeps its address from being reused
        return tensor

    with walk.restored(network, buffers=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(network(x), y)
    return sum(saved.values())


def _storage(tensor: Tensor) -> tuple[int, int]:
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def histogram(values: Tensor, step: int, where: str = "first") -> Histogram:
    """Return the histogram of all values in a tensor, as a record of one step."""
    return Histogram(step=step, where=where, **binned(values))


def binned(values: Tensor) -> dict[str, Any]:
    """Return the fields of a histogram of all values in a tensor, without the place and the step."""
    flat = values.detach().flatten().cpu().double().numpy()
    kept = flat[np.isfinite(flat)]
    if len(kept) == 0:
        return {"low": 0.0, "high": 1.0, "counts": [0] * BINS, "nonfinite": len(flat), "percentiles": None}
    low, high = float(kept.min()), float(kept.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(kept, BINS, (low, high))
    return {
        "low": low,
        "high": high,
        "counts": counts.tolist(),
        "nonfinite": len(flat) - len(kept),
        "percentiles": np.percentile(kept, PERCENTILES).tolist(),
    }


@dataclass(frozen=True)
class _Watched:
    """One call of a module in a forward pass, and whether its input or its output is recorded."""

    where: str
    module: nn.Module
    call: int  # one module may be called several times
    takes_input: bool
    description: str


class Activations:
    """The inputs of the network's first and last activation, which the normalizations there control.

    Watch the first and the last call of an activation module of `torch.nn` in a forward pass. In a network that calls
    activations as functions, watch the outputs of the first and the last normalization layer instead; for `none`, that
    layer is an identity. If the first and the last are the same call, only `first` exists.

    Args:
        network: On any device; in training mode afterwards.
        norm: The norm that the network was built with.
        sample: Some inputs, `[N, *in_shape]`, on that device.

    Attributes:
        descriptions: Description of each watched activation, by `first` and `last`; empty if there is none.
    """

    def __init__(self, network: nn.Module, norm: Norm, sample: Tensor) -> None:
        names = {module: name for name, module in network.named_modules()}
        activations = [module for module in names if _is_activation(module)]
        made = [module for module in norm.made if module in names]
        calls = _calls(network, {*activations, *made}, sample)
        of_activations = [call for call in calls if _is_activation(call[0])]
        self._watched: list[_Watched] = []
        chosen = of_activations or calls
        for where, (module, call) in zip(("first", "last"), [*chosen[:1], *chosen[1:][-1:]], strict=False):
            side = "input to" if of_activations else "output of"
            again = f", call {call + 1}" if call else ""
            description = f"{side} {names[module]} ({type(module).__name__}{again})"
            self._watched.append(_Watched(where, module, call, bool(of_activations), description))
        self.descriptions = {watched.where: watched.description for watched in self._watched}

    @contextmanager
    def watch(self, step: int, watch: Stopwatch, found: list[Histogram]) -> Iterator[None]:
        """Append to `found` the histograms of the block's first forward pass, off the clock."""
        with ExitStack() as stack:
            for watched in self._watched:
                stack.callback(_hook(watched, step, watch, found).remove)
            yield


def _hook(watched: _Watched, step: int, watch: Stopwatch, found: list[Histogram]) -> RemovableHandle:
    calls = itertools.count()

    def record(values: Tensor) -> None:
        if next(calls) == watched.call:
            with watch.paused():
                found.append(histogram(values, step, watched.where))

    if watched.takes_input:
        return watched.module.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))
    return watched.module.register_forward_hook(lambda _, __, output: record(output))


def _calls(network: nn.Module, modules: set[nn.Module], sample: Tensor) -> list[tuple[nn.Module, int]]:
    """Return the calls of these modules in a forward pass, each with the number of its module's earlier calls."""
    calls: list[tuple[nn.Module, int]] = []
    counts: Counter[nn.Module] = Counter()

    def note(module: nn.Module, _: object) -> None:
        calls.append((module, counts[module]))
        counts[module] += 1

    with ExitStack() as stack:
        stack.callback(network.train)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            network.eval()(sample)
    return calls


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
    )


def layers(network: nn.Module, norm: Norm) -> list[Layer]:
    """Return γ, β and the running statistics of every normalization layer that has any of them."""
    made = set(norm.made)
    found = []
    for name, module in network.named_modules():
        if module in made or isinstance(module, nn.modules.batchnorm._NormBase):
            values = [_channels(module, which) for which in ("weight", "bias", "running_mean", "running_var")]
            if any(value is not None for value in values):
                found.append(Layer(name, type(module).__name__, *values))
    return found


def _channels(module: nn.Module, name: str) -> list[float | None] | None:
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        return None
    return [finite(value) for value in tensor.detach().flatten().tolist()]
