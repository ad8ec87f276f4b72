"""The operators, which launch kernels. Importing this module imports Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops.schemas import Attributes, Batch, Kept, Running, Vectors, grouped
from batchnorm.ops.triton import tiling
from batchnorm.ops.triton.counters import counters
from batchnorm.ops.triton.frame import Frame, KernelVectors, kernel_weights, on_device
from batchnorm.ops.triton.kernels import finish
from batchnorm.ops.triton.kernels.backward import (
    backward_apply_kernel,
    backward_once_kernel,
    backward_reduce_kernel,
    merge_sums_kernel,
)
from batchnorm.ops.triton.kernels.forward import forward_once_kernel, normalize_kernel
from batchnorm.ops.triton.kernels.moments import merge_moments_kernel, moments_kernel
from batchnorm.ops.triton.kernels.running import update_running_kernel
from batchnorm.ops.triton.kernels.smallest import smallest_kernel
from batchnorm.ops.triton.tiling import Tiling
from batchnorm.ops.triton.variants import Kernel

_MOMENTS, _MERGE_MOMENTS = Kernel(moments_kernel), Kernel(merge_moments_kernel)
_NORMALIZE, _FORWARD_ONCE = Kernel(normalize_kernel), Kernel(forward_once_kernel)
_REDUCE, _MERGE_SUMS = Kernel(backward_reduce_kernel), Kernel(merge_sums_kernel)
_APPLY, _BACKWARD_ONCE = Kernel(backward_apply_kernel), Kernel(backward_once_kernel)
_UPDATE_RUNNING, _SMALLEST = Kernel(update_running_kernel), Kernel(smallest_kernel)

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MERGE = {"B0": tiling.MERGE_SPLITS, "B1": tiling.MERGE_CHANNELS, "num_warps": 8}
_RUNNING_BLOCK = 1024

_Result = TypeVar("_Result")


def _launcher(implementation: Callable[..., _Result]) -> Callable[..., _Result]:
    """Make an implementation callable with its schema's flat arguments, and start kernels on its tensors' device."""
    flat = grouped(implementation)

    @functools.wraps(implementation)
    def operator(*args: object) -> _Result:
        first = args[0]
        assert isinstance(first, Tensor)
        with on_device(first):
            return flat(*args)

    return operator


def _parts(frame: Frame, t: Tiling, index: Tensor | None, number: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Return memory for the results of each split, the counters of the merge, and the number of rows of the memory.

    A single split has neither. With an index, splits are merged by another launch, without counters.
    """
    if index is not None:
        return frame.vectors(1, number, t.splits, t.channels)[0], None, t.splits
    if t.splits == 1:
        return None, None, 1
    rows, level = 0, t.splits
    while level > 1:
        rows, level = rows + level, -(-level // finish.FAN.value)
    return frame.vectors(1, number, rows, t.channels)[0], counters(frame.device, rows * t.blocks), rows


def _launch_moments(
    frame: Frame, x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int, *, variance: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Return count (with an index), mean, mean_low, and m2 or the biased variance."""
    t = frame.streamed(index, by_sample=True)
    mean, mean_low, m2 = results = frame.row_vectors(3, index, groups)
    values = index is not None and frame.s == 1  # the parts of such samples would be larger than x
    if values:
        parts: Tensor | None = x
    else:
        parts, counted, rows = _parts(frame, t, index, 4)
        _MOMENTS.start(
            t.grid, (x, weights, parts, counted, *results), (), (*t.shape, t.channels, t.per, t.splits, rows, t.blocks),
            VARIANCE=variance, **t.constants,
        )  # fmt: skip
    count = sample_counts = None
    if index is not None:
        count = torch.empty(groups, dtype=torch.float64, device=frame.device)
        if weights is None:
            sample_counts = torch.full((frame.n,), frame.s, dtype=torch.float64, device=frame.device)
        else:
            sample_counts = weights.reshape(frame.n, -1).sum(1, dtype=torch.float64)
        _MERGE_MOMENTS.start(
            (t.merge_blocks * groups,), (parts, index, sample_counts, count, *results), (),
            (t.channels, t.splits, t.merge_blocks), dtype=_DTYPES[frame.dtype], VARIANCE=variance,
            VALUES=values, **_MERGE,
        )  # fmt: skip
    return count, mean, mean_low, m2


@_launcher
def moments(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, mean, mean_low and m2."""
    frame = Frame.of(x)
    x, weights, index = frame.read(x), kernel_weights(weights), None if index is None else index.contiguous()
    count, mean, mean_low, m2 = _launch_moments(frame, x, index, weights, groups, variance=False)
    if count is None:
        count = x.new_full((), frame.m, dtype=torch.float64) if weights is None else weights.sum(dtype=torch.float64)
    return count, mean, mean_low, m2


class _Update(NamedTuple):
    """The running statistics that a forward pass updates, and their momentum."""

    running: tuple[Tensor | None, ...]
    momentum: float


_NO_UPDATE = _Update((None, None, None), 0.0)


@_launcher
def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, attributes: Attributes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean, mean_low and the biased variance, in one launch if a program can hold its channels."""
    return _train_forward(x, weight, bias, residual, attributes, _NO_UPDATE)


@_launcher
def train_forward_and_update_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    attributes: Attributes,
    running: Running,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do `train_forward` and `update_running_` in the launches of `train_forward`.

    The last of them updates, so that nothing is updated if a kernel does not compile. Each program updates its own
    channels. Neither the cumulative average nor a check for non-finite values is possible here, because they need the
    counter before or the statistics of all channels.
    """
    if torch._C._current_graph_task_id() != -1:
        return _train_forward(x, weight, bias, residual, attributes, _NO_UPDATE)
    found = _train_forward(x, weight, bias, residual, attributes, _Update(running, momentum))
    torch.autograd.graph.increment_version([t for t in running if t is not None])
    return found


def _train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    attributes: Attributes,
    update: _Update,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frame = Frame.of(x)
    x, residual = frame.read(x), frame.read_if(residual)
    t = frame.at_once(1)
    if t is None:
        _, mean, mean_low, var = _launch_moments(frame, x, None, None, 1, variance=True)
        vectors = KernelVectors.of(Vectors(mean, mean_low, var, weight, bias), None)
        y = _launch_normalize(frame, x, residual, vectors, attributes, update)
    else:
        y, (mean, mean_low, var) = frame.result(), frame.row_vectors(3)
        weight, bias = None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()
        eps, activation, negative_slope = attributes
        _FORWARD_ONCE.start(
            t.grid, (x, residual, y, mean, mean_low, var, weight, bias, *update.running),
            (eps, negative_slope, frame.m, update.momentum), (*t.shape, t.channels, t.blocks),
            ACTIVATION=activation, **t.constants,
        )  # fmt: skip
    return frame.returned(y), mean, mean_low, var


def _launch_normalize(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    vectors: KernelVectors,
    attributes: Attributes,
    update: _Update = _NO_UPDATE,
) -> Tensor:
    y, t = frame.result(), frame.streamed(vectors.index)
    eps, activation, negative_slope = attributes
    _NORMALIZE.start(
        t.grid, (x, residual, y, *vectors.tensors, vectors.index, *update.running),
        (eps, negative_slope, frame.m, update.momentum),
        (*t.shape, t.channels, *vectors.sizes, t.per, t.blocks), ACTIVATION=activation, **t.constants,
    )  # fmt: skip
    return y


@_launcher
def normalize(
    x: Tensor, vectors: Vectors, residual: Tensor | None, index: Tensor | None, attributes: Attributes
) -> Tensor:
    """Return y from given statistics."""
    frame = Frame.of(x)
    x, residual = frame.read(x), frame.read_if(residual)
    return frame.returned(_launch_normalize(frame, x, residual, KernelVectors.of(vectors, index), attributes))


class _Backward:
    """The arguments that all operators of the backward pass share, in the form that kernels take."""

    def __init__(self, dy: Tensor, kept: Kept, index: Tensor | None, attributes: Attributes) -> None:
        self.frame = frame = Frame.of(kept.x)
        eps, self.activation, negative_slope = attributes
        y = None if self.activation == "none" else kept.y
        residual = None if self.activation == "none" or y is not None else kept.residual
        self.data = (frame.read(dy), frame.read(kept.x), frame.read_if(residual), frame.read_if(y))
        self.vectors = KernelVectors.of(kept.vectors, index)
        self.scalars = (eps, negative_slope)

    def results(self, need_dz: bool) -> tuple[Tensor, Tensor | None]:
        """Allocate dx, and dz if `need_dz`."""
        return self.frame.result(), self.frame.result() if need_dz else None

    def returned(self, dx: Tensor, dz: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return dx and dz as operators return them."""
        return self.frame.returned(dx), dx.new_empty(0) if dz is None else self.frame.returned(dz)

    def reduce(self, groups: int, dx: Tensor | None = None, dz: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return Σ dz and Σ dz·x̂; with constant statistics, write dx and dz in the same launch."""
        frame, vectors = self.frame, self.vectors
        t = frame.streamed(vectors.index, by_sample=True)
        sums = frame.row_vectors(2, vectors.index, groups)
        parts, counted, rows = _parts(frame, t, vectors.index, 2)
        _REDUCE.start(
            t.grid, (*self.data, dx, dz, *vectors.tensors, vectors.index, parts, counted, *sums), self.scalars,
            (*t.shape, t.channels, *vectors.sizes, t.per, t.splits, rows, t.blocks),
            ACTIVATION=self.activation, **t.constants,
        )  # fmt: skip
        if vectors.index is not None:
            _MERGE_SUMS.start(
                (t.merge_blocks * groups,), (parts, vectors.index, *sums), (),
                (t.channels, t.splits, t.merge_blocks), **_MERGE,
            )  # fmt: skip
        return sums[0], sums[1]

    def apply(
        self, means: tuple[Tensor, Tensor] | None, weights: Tensor | None, need_dz: bool, *, sums: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return dx and dz from the means of dx̂ and dx̂·x̂, or from Σ dz and Σ dz·x̂ (`sums`)."""
        frame, vectors = self.frame, self.vectors
        t = frame.streamed(vectors.index)
        results = self.results(need_dz)
        _APPLY.start(
            t.grid,
            (*self.data, *results, *vectors.tensors, *(means or (None, None)), vectors.index, kernel_weights(weights)),
            (*self.scalars, frame.m), (*t.shape, t.channels, *vectors.sizes, t.per, t.blocks),
            ACTIVATION=self.activation, SUMS=sums, **t.constants,
        )  # fmt: skip
        return self.returned(*results)


@_launcher
def train_backward(
    dy: Tensor, kept: Kept, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dγ, dβ and dz, in one launch if a program can hold its channels."""
    call = _Backward(dy, kept, None, attributes)
    frame = call.frame
    t = frame.at_once(2)
    if t is None:
        dbias, dweight = call.reduce(1)
        dx, dz = call.apply((dbias, dweight), None, need_dz, sums=True)
    else:
        dbias, dweight = frame.row_vectors(2)
        results = call.results(need_dz)
        _BACKWARD_ONCE.start(
            t.grid, (*call.data, *results, *call.vectors.tensors, dbias, dweight), (*call.scalars, frame.m),
            (*t.shape, t.channels, t.blocks), ACTIVATION=call.activation, **t.constants,
        )  # fmt: skip
        dx, dz = call.returned(*results)
    return dx, dweight, dbias, dz


@_launcher
def normalize_backward(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, Σ dz·x̂, Σ dz and dz with constant statistics; x and dy are read once."""
    call = _Backward(dy, kept, index, attributes)
    results = call.results(need_dz)
    sum_dz, sum_dz_xhat = call.reduce(groups, *results)
    dx, dz = call.returned(*results)
    return dx, sum_dz_xhat, sum_dz, dz


@_launcher
def backward_reduce(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes
) -> tuple[Tensor, Tensor]:
    """Return Σ dz and Σ dz·x̂."""
    return _Backward(dy, kept, index, attributes).reduce(groups)


@_launcher
def backward_apply(
    dy: Tensor,
    kept: Kept,
    mean_dxhat: Tensor | None,
    mean_dxhat_xhat: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    attributes: Attributes,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx from the means of dx̂ and dx̂·x̂, and dz."""
    call = _Backward(dy, kept, index, attributes)
    if mean_dxhat is None or mean_dxhat_xhat is None:
        return call.apply(None, None, need_dz)
    means = mean_dxhat.to(torch.float32).contiguous(), mean_dxhat_xhat.to(torch.float32).contiguous()
    return call.apply(means, weights, need_dz)


@_launcher
def update_running_(running: Running, batch: Batch, momentum: float | None, skip_nonfinite: bool) -> None:
    """Update the running statistics, which are contiguous, in one launch."""
    if torch._C._current_graph_task_id() != -1:
        return
    if momentum is None and running.num_batches_tracked is None:
        raise RuntimeError(_checks.missing_counter("batchnorm::update_running_"))
    statistics = (t.contiguous() for t in batch[:3])
    _UPDATE_RUNNING.start(
        (1,), (*running, *statistics, batch.count), (0.0 if momentum is None else momentum,),
        (batch.m, running.mean.numel()),
        SKIP=skip_nonfinite, CUMULATIVE=momentum is None, BLOCK=_RUNNING_BLOCK, num_warps=4,
    )  # fmt: skip
    changed = [t for t in running if t is not None]
    torch.autograd.graph.increment_version(changed)


def start_smallest_kernel(device: torch.device) -> None:
    """Compile and start the smallest kernel, to find out whether the device can run any."""
    out = torch.empty(1, device=device)
    with on_device(out):
        _SMALLEST.start((1,), (out,), (0.0,), (0,), num_warps=1)
