"""Layers on a GPU: the cases, the contenders, the check of our results, and the times."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from benchmarks.gpu.timing import Call, Clock
from benchmarks.measuring import records
from benchmarks.subjects import cases

# Channels and positions of ResNet-50's layers at 224×224.
LAYERS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
BATCHES = (32, 256)
EPS = 1e-5
OURS, TORCH, NATIVE, COMPILED = "batchnorm", "torch", "torch without cuDNN", "torch.compile"

Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step of batch normalization and ReLU, with or without an addition."""

    shape: tuple[int, int, int, int]
    layout: str
    dtype: str
    residual: bool

    def __str__(self) -> str:
        return f"{cases.shape_text(self.shape)} {self.layout} {self.dtype} {self.task}"

    @property
    def task(self) -> str:
        return "BN+add+ReLU" if self.residual else "BN+ReLU"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * cases.DTYPES[self.dtype].itemsize

    @property
    def least_traffic(self) -> int:
        """Traffic of forward and backward in tensors of x's size, if each is read once."""
        return (2 + self.residual) + (3 + 2 * self.residual)

    def traffic(self, registers: int, cache: int) -> int:
        """Return the traffic on a device with this many bytes of registers per multiprocessor and of cache.

        The inputs of a reduction are read once if a channel fits one multiprocessor's registers (contiguous), or if the
        tensors fit the cache; otherwise twice.
        """
        found = self.least_traffic
        for reads in (1, 2 + self.residual):  # x forward; x, dy and y backward
            channel = self.nbytes // self.shape[1] if self.layout == "contiguous" else math.inf
            if reads * channel > registers and (reads + 1) * self.nbytes > cache:
                found += reads
        return found

    def data(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return x, the residual and dy."""
        make = lambda: cases.in_layout(torch.randn(self.shape, device=device), self.layout)  # noqa: E731
        kind = cases.DTYPES[self.dtype]
        return make().to(kind), make().to(kind) if self.residual else None, make().to(kind)


def all_cases(dry: bool) -> list[Case]:
    """Return every case, the smaller batch first; with `dry`, one small case of each kind."""
    shapes = [(4, 8, 6, 6)] if dry else [(n, c, s, s) for n in BATCHES for c, s in LAYERS]
    return [Case(*point) for point in itertools.product(shapes, cases.LAYOUTS, cases.DTYPES, (False, True))]


def _ours(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    layer = batchnorm.BatchNormAct2d(channels, eps=EPS, activation="relu", device=device)
    return layer, layer


def _torch(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    layer = nn.BatchNorm2d(channels, eps=EPS, device=device)
    return layer, lambda x, residual: F.relu(layer(x) if residual is None else layer(x) + residual)


def _compiled(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    torch._dynamo.reset()
    layer, forward = _torch(channels, device)
    return layer, torch.compile(forward, dynamic=False)


CONTENDERS = {OURS: _ours, TORCH: _torch, NATIVE: _torch, COMPILED: _compiled}


def fallback() -> str | None:
    """Return how CUDA tensors are computed if not only by the kernels, else None."""
    found = batchnorm.backends()["cuda"]
    return None if found.startswith("triton") and "eager" not in found else found


@contextlib.contextmanager
def settings_of(contender: str, device: torch.device) -> Iterator[None]:
    """Enable or disable cuDNN for the block.

    Raises:
        RuntimeError: our kernels were not used on a GPU.
    """
    with torch.backends.cudnn.flags(enabled=contender != NATIVE):
        yield
    if contender == OURS and device.type == "cuda" and (found := fallback()):
        raise RuntimeError(f"The kernels must be used, but the implementation is {found}.")


def step(layer: nn.Module, forward: Forward, x: Tensor, residual: Tensor | None, dy: Tensor) -> Call:
    """Return a call that computes y and all gradients once."""
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    wanted = [*inputs, *layer.parameters()]

    def call() -> tuple[Tensor, ...]:
        y = forward(inputs[0], inputs[1] if len(inputs) > 1 else None)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy))

    return call


def largest_error(case: Case, device: torch.device) -> float:
    """Return the largest error of our step's results against float64, relative to each result's largest value."""
    x, residual, dy = case.data(device)
    reference, forward = _torch(case.shape[1], device)
    reference.double()
    wide = (x.double(), None if residual is None else residual.double())
    with torch.no_grad():  # dy is zero where rounding decides the ReLU's derivative
        z = reference(wide[0]) if wide[1] is None else reference(wide[0]) + wide[1]
        dy.masked_fill_(z.abs() < (1e-3 if case.dtype == "float32" else 5e-2), 0.0)
    with settings_of(OURS, device):
        ours = step(*_ours(case.shape[1], device), x, residual, dy)()
    found = 0.0
    for result, expected in zip(ours, step(reference, forward, *wide, dy.double())(), strict=True):
        error = float((result.double() - expected).abs().max() / expected.abs().max())
        found = error if math.isnan(error) else max(found, error)
        if math.isnan(found):
            break
    return found


def check(case: Case, device: torch.device) -> None:
    """Compare our step's results with float64.

    Raises:
        ArithmeticError: If an error exceeds the tolerance of the dtype.
    """
    error = largest_error(case, device)
    if not error <= cases.TOLERANCE[case.dtype]:
        raise ArithmeticError(f"off by {error:.2g} of the largest value")


def measure(case: Case, clock: Clock, contender: str, speed: float, repeats: int) -> records.Row:
    """Return the row of a contender in a case; inputs rotate if they would otherwise stay in the cache."""
    cache, traffic = clock.cache_bytes(), case.nbytes * (3 if case.residual else 2)
    sets = [case.data(clock.device) for _ in range(min(max(1, 2 * cache // traffic + 1), 32))]
    needed = case.traffic(clock.register_bytes(), cache)
    floor = needed * case.nbytes / speed
    with settings_of(contender, clock.device):
        layer, forward = CONTENDERS[contender](case.shape[1], clock.device)
        calls = [step(layer, forward, *data) for data in sets]
        captured = clock.seconds(calls, repeats=repeats, captured=True)
        launched = clock.seconds(calls, repeats=repeats, captured=False)
        peak = clock.peak_bytes(calls[0])
    return {
        "device": clock.name(),
        "shape": cases.shape_text(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "task": case.task,
        "contender": contender,
        "ms": captured * 1e3,
        "ms_launched": launched * 1e3,
        "floor_ms": floor * 1e3,
        "share_of_floor": floor / captured,
        "sets": len(sets),
        "passes": needed,
        "read_once": needed == case.least_traffic,
        "peak_bytes": peak,
        "bytes": case.nbytes,
        "beyond_cache": case.nbytes > cache,
        "copy_gb_per_s": speed / 1e9,
    }
