"""The cases: shapes, memory layouts, dtypes and tasks, the data of a case, and its float64 reference."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = (
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (4096, 1024),
    (2, 64, 32, 64, 64),
)
SMALL = ((8, 16, 14, 14), (128, 64))
LAYOUTS = ("contiguous", "channels-last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPS = 1e-5
STEP = "BN+ReLU forward+backward"  # the task of most targets


@dataclass(frozen=True)
class Task:
    """A task of batch normalization in a network, and the least memory traffic that it needs.

    Traffic is counted in tensors of x's size that are read or written: a copy is two.
    """

    training: bool
    backward: bool
    activation: bool
    residual: bool

    @property
    def allocations(self) -> int:
        """Number of results of x's size."""
        return 1 + (1 + self.residual if self.backward else 0)

    @property
    def traffic(self) -> int:
        """Traffic if forward reads x once, and backward reads x and dy once."""
        return 2 + self.residual + ((3 + 2 * self.residual) if self.backward else 0)

    @property
    def traffic_read_twice(self) -> int:
        """Traffic if statistics and normalization must read x separately: channels-last beyond the cache."""
        if not self.training:
            return self.traffic
        return self.traffic + 1 + ((2 + self.residual) if self.backward else 0)


TASKS = {
    "BN+ReLU forward": Task(True, False, True, False),
    STEP: Task(True, True, True, False),
    "BN forward+backward": Task(True, True, False, False),
    "BN+add+ReLU forward+backward": Task(True, True, True, True),
    "BN inference": Task(False, False, False, False),
    "BN+ReLU inference": Task(False, False, True, False),
    "BN+add+ReLU inference": Task(False, False, True, True),
}


# The tasks that a target judges for large tensors under the default allocator, where page faults make calls slow.
JUDGED_BY_DEFAULT = ("BN+ReLU forward", STEP, "BN+ReLU inference", "BN+add+ReLU inference")


@dataclass(frozen=True)
class Case:
    """A shape in a memory layout and dtype, and a task. Parameters and statistics are float32."""

    shape: tuple[int, ...]
    layout: str
    dtype: str
    task_name: str

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def spreads(self) -> bool:
        """Whether the values of a channel are spread over the whole tensor."""
        return self.layout == "channels-last" or len(self.shape) == 2


def layouts_of(shape: tuple[int, ...]) -> tuple[str, ...]:
    return LAYOUTS if len(shape) > 2 else LAYOUTS[:1]


def shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(str(n) for n in shape)


def in_layout(t: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return t.contiguous()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.contiguous(memory_format=formats[t.dim()])


@dataclass
class Data:
    """The tensors of a case. dy is zero where z is so close to the kink that rounding decides the ReLU's derivative."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    reference: dict[str, Tensor] = field(default_factory=dict)


def by_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(1, -1, *[1] * (x.dim() - 2))


def make_data(case: Case, offset: float = 0.0) -> Data:
    """Return the case's tensors, with the mean `offset` deviations from zero, and the exact results for them."""
    contiguous = _contiguous_data(case.shape, case.dtype, case.task_name, offset)

    def laid_out(t: Tensor) -> Tensor:
        return in_layout(t, case.layout)

    return Data(
        laid_out(contiguous.x),
        None if contiguous.residual is None else laid_out(contiguous.residual),
        laid_out(contiguous.dy),
        contiguous.weight.clone(),
        contiguous.bias.clone(),
        contiguous.running_mean.clone(),
        contiguous.running_var.clone(),
        contiguous.reference,
    )


@functools.lru_cache(maxsize=1)  # the layouts of one case follow one another
def _contiguous_data(shape: tuple[int, ...], dtype: str, task_name: str, offset: float) -> Data:
    task, kind, channels = TASKS[task_name], DTYPES[dtype], shape[1]
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = normal(*shape).add_(offset).to(kind)
    residual = normal(*shape).to(kind) if task.residual else None
    data = Data(
        x,
        residual,
        normal(*shape),
        1 + 0.2 * normal(channels),
        0.2 * normal(channels),
        offset + 0.1 * normal(channels),
        1 + 0.1 * normal(channels).abs(),
    )
    with torch.enable_grad():
        wide = {name: getattr(data, name).double() for name in ("x", "weight", "bias")}
        if residual is not None:
            wide["residual"] = residual.double()
        for t in wide.values():
            t.requires_grad_(task.backward)
        x64 = wide["x"]
        if task.training:
            dims = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x64, dims, correction=0, keepdim=True)
        else:
            mean, var = by_channel(data.running_mean.double(), x), by_channel(data.running_var.double(), x)
        x_hat = (x64 - mean) / (var + EPS).sqrt()
        z = x_hat * by_channel(wide["weight"], x) + by_channel(wide["bias"], x)
        if residual is not None:
            z = z + wide["residual"]
        y = F.relu(z) if task.activation else z
        if task.activation and task.backward:
            near = 1e-3 if kind is torch.float32 else 5e-2
            data.dy[z.detach().abs() < near] = 0
        data.dy = data.dy.to(kind)
        data.reference["y"] = y.detach()
        if task.backward:
            gradients = torch.autograd.grad(y, list(wide.values()), data.dy.double())
            data.reference |= {f"d{name}": g for name, g in zip(wide, gradients, strict=True)}
    return data


# Relative to max |reference|: a larger error means another computation. torch itself has 3e-5 in sums of 400,000.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def errors(case: Case, data: Data, results: dict[str, Tensor]) -> dict[str, float]:
    """Return max |result − reference| / max |reference| of every result."""
    if results.keys() != data.reference.keys():
        raise ValueError(f"expected results {sorted(data.reference)}, got {sorted(results)}")
    found = {}
    for name, reference in data.reference.items():
        difference = (results[name].detach().double() - reference).abs().max()
        found[name] = float(difference / reference.abs().max().clamp_min(1e-300))
    return found
