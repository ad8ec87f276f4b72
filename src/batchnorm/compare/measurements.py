"""What is measured while a network trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from batchnorm.compare.data import Data
from batchnorm.compare.norms import Norm
from batchnorm.compare.records import Evaluation, Histogram, Layer, finite

BINS = 64
PERCENTILES = (15, 50, 85)
TEST_BATCH = 1000


class Stopwatch:
    """Adds up the time between `start` and `stop`, without what happens inside `paused`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def start(self) -> None:
        """Lets the time run."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Holds the time."""
        self.seconds += time.perf_counter() - self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()


def evaluate(network: nn.Module, data: Data, step: int, train_seconds: float) -> Evaluation:
    """Returns loss and accuracy on the whole test set; the network is in training mode afterwards."""
    loss, right = 0.0, 0
    network.eval()
    try:
        with torch.no_grad():
            for x, y in zip(data.x_test.split(TEST_BATCH), data.y_test.split(TEST_BATCH), strict=True):
                scores = network(x)
                loss += float(F.cross_entropy(scores, y, reduction="sum"))
                right += int((scores.argmax(1) == y).sum())
    finally:
        network.train()
    samples = len(data.y_test)
    return Evaluation(step, train_seconds, finite(loss / samples), right / samples)


def histogram(values: Tensor, step: int) -> Histogram:
    """Returns the distribution of all values in a tensor."""
    flat = values.detach().flatten().double().numpy()
    kept = flat[np.isfinite(flat)]
    if len(kept) == 0:
        return Histogram(step, 0.0, 1.0, [0] * BINS, len(flat), None)
    low, high = float(kept.min()), float(kept.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, _ = np.histogram(kept, BINS, (low, high))
    percentiles = np.percentile(kept, PERCENTILES).tolist()
    return Histogram(step, low, high, counts.tolist(), len(flat) - len(kept), percentiles)


class FirstActivation:
    """The input to the network's first nonlinearity: what the first normalization controls.

    It is the first activation module of `torch.nn` that is called; in a network that calls activations as
    functions, the output of the first normalization layer (`none` makes an identity that serves as well).

    Attributes:
        description: What is watched, in words; None if there is neither.
    """

    def __init__(self, network: nn.Module, norm: Norm, sample: Tensor) -> None:
        names = {module: name for name, module in network.named_modules()}
        made = [module for module in norm.made if module in names]
        called: list[nn.Module] = []
        watched = [module for module in names if _is_activation(module)] + made
        handles = [module.register_forward_pre_hook(lambda module, _: called.append(module)) for module in watched]
        try:
            with torch.no_grad():
                network.eval()(sample)
        finally:
            network.train()
            for handle in handles:
                handle.remove()
        activation = next((module for module in called if _is_activation(module)), None)
        norm_layer = next((module for module in called if module in made), None)
        self._module = activation if activation is not None else norm_layer
        self._takes_input = activation is not None
        self.description: str | None = None
        if activation is not None:
            self.description = f"input to {names[activation]} ({type(activation).__name__})"
        elif norm_layer is not None:
            self.description = f"output of {names[norm_layer]} ({type(norm_layer).__name__})"

    @contextmanager
    def watch(self, step: int, watch: Stopwatch, found: list[Histogram]) -> Iterator[None]:
        """Adds to `found` the distribution in the block's first forward pass, off the clock."""
        if self._module is None:
            yield
            return
        handle: RemovableHandle

        def see(values: Tensor) -> None:
            with watch.paused():
                found.append(histogram(values, step))
                handle.remove()

        if self._takes_input:
            handle = self._module.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
        else:
            handle = self._module.register_forward_hook(lambda _, __, output: see(output))
        try:
            yield
        finally:
            handle.remove()


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
        module, (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)
    )


def layers(network: nn.Module, norm: Norm) -> list[Layer]:
    """Returns γ, β and running statistics of every normalization layer that has any of them."""
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
