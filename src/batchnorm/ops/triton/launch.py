"""The operators as launches of kernels. Importing this module imports Triton."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.ops.triton import plan
from batchnorm.ops.triton.frame import Frame, Vectors, on_device
from batchnorm.ops.triton.kernels.backward import (
    backward_apply_kernel,
    backward_once_kernel,
    backward_reduce_kernel,
    merge_sums_kernel,
)
from batchnorm.ops.triton.kernels.forward import forward_once_kernel, normalize_kernel
from batchnorm.ops.triton.kernels.moments import merge_moments_kernel, moments_kernel
from batchnorm.ops.triton.kernels.running import update_running_kernel

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MERGE = {"B0": plan.MERGE_SPLITS, "B1": plan.MERGE_CHANNELS, "num_warps": 8}
_RUNNING_BLOCK = 1024


def _launch_moments(
    frame: Frame, x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int, *, variance: bool
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Count (with an index), mean, mean_low, and m2 or the biased variance."""
    p = frame.streamed(index, by_sample=True)
    shape = (p.channels,) if index is None else (groups, p.channels)
    mean, mean_low, m2 = results = frame.vectors(3, *shape)
    parts = None if index is None and p.splits == 1 else frame.vectors(1, 4, p.splits, p.channels)[0]
    moments_kernel[p.grid](
        x, weights, parts, *results, *p.shape, p.channels, p.per, p.splits, p.blocks, VARIANCE=variance, **p.constants
    )
    count = sample_counts = None
    if index is not None:
        count = torch.empty(groups, dtype=torch.float64, device=frame.device)
        if weights is None:
            sample_counts = torch.full((frame.n,), frame.s, dtype=torch.float64, device=frame.device)
        else:
            sample_counts = weights.reshape(frame.n, -1).sum(1, dtype=torch.float64)
    if parts is not None:
        blocks = -(-p.channels // plan.MERGE_CHANNELS)
        merge_moments_kernel[(blocks * groups,)](
            parts, index, sample_counts, count, *results, p.channels, p.splits, blocks,
            dtype=_DTYPES[frame.dtype], VARIANCE=variance, **_MERGE,
        )  # fmt: skip
    return count, mean, mean_low, m2


def moments(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean, mean_low and m2."""
    frame = Frame(x)
    with on_device(x):
        x, weights, index = frame.read(x), frame.weights(weights), None if index is None else index.contiguous()
        count, mean, mean_low, m2 = _launch_moments(frame, x, index, weights, groups, variance=False)
        if count is None:
            m = float(frame.n * frame.s)
            count = x.new_full((), m, dtype=torch.float64) if weights is None else weights.sum(dtype=torch.float64)
    return count, mean, mean_low, m2


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, mean_low and the biased variance: in one launch where a program can hold its channels."""
    frame = Frame(x)
    with on_device(x):
        x = frame.read(x)
        p = frame.at_once(1)
        if p is None:
            _, mean, mean_low, var = _launch_moments(frame, x, None, None, 1, variance=True)
            y = _launch_normalize(
                frame, x, residual, Vectors(mean, mean_low, var, weight, bias, None), eps, activation, negative_slope
            )
        else:
            y, (mean, mean_low, var) = frame.result(), frame.vectors(3, p.channels)
            (residual,) = frame.read_any(residual)
            weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
            forward_once_kernel[p.grid](
                x, residual, y, mean, mean_low, var, weight, bias, eps, negative_slope, float(frame.n * frame.s),
                *p.shape, p.channels, p.blocks, ACTIVATION=activation, **p.constants,
            )  # fmt: skip
        return frame.returned(y), mean, mean_low, var


def _launch_normalize(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    vectors: Vectors,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    y, p = frame.result(), frame.streamed(vectors.index)
    (residual,) = frame.read_any(residual)
    normalize_kernel[p.grid](
        x, residual, y, *vectors.pointers, vectors.index, eps, negative_slope, *p.shape, p.channels, p.positions,
        *vectors.strides, p.per, p.blocks, ACTIVATION=activation, **p.constants,
    )  # fmt: skip
    return y


def normalize(
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    index: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> Tensor:
    """y from given statistics."""
    frame = Frame(x)
    with on_device(x):
        vectors = Vectors(mean, mean_low, var, weight, bias, index)
        y = _launch_normalize(frame, frame.read(x), residual, vectors, eps, activation, negative_slope)
        return frame.returned(y)


class _Backward:
    """What every operator of the backward pass is given, as kernels take it."""

    def __init__(
        self,
        dy: Tensor,
        x: Tensor,
        residual: Tensor | None,
        y: Tensor | None,
        mean: Tensor,
        mean_low: Tensor | None,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
        eps: float,
        activation: str,
        negative_slope: float,
    ) -> None:
        self.frame = frame = Frame(x)
        if activation == "none" or y is not None:
            residual = None
        if activation == "none":
            y = None
        self.data = (frame.read(dy), frame.read(x), *frame.read_any(residual, y))
        self.vectors = Vectors(mean, mean_low, var, weight, bias, index)
        self.scalars = (eps, negative_slope)
        self.activation = activation

    def results(self, need_dz: bool) -> tuple[Tensor, Tensor | None]:
        """dx, and dz if asked for."""
        return self.frame.result(), self.frame.result() if need_dz else None

    def returned(self, dx: Tensor, dz: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, as operators return them."""
        return self.frame.returned(dx), dx.new_empty(0) if dz is None else self.frame.returned(dz)

    def reduce(self, groups: int, dx: Tensor | None = None, dz: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Σ dz and Σ dz·x̂; with held statistics dx and dz on the way."""
        frame, vectors = self.frame, self.vectors
        p = frame.streamed(vectors.index, by_sample=True)
        shape = (p.channels,) if vectors.index is None else (groups, p.channels)
        sum_dz, sum_dz_xhat = frame.vectors(2, *shape)
        alone = vectors.index is None and p.splits == 1
        parts = None if alone else frame.vectors(1, 2, p.splits, p.channels)[0]
        backward_reduce_kernel[p.grid](
            *self.data, dx, dz, *vectors.pointers, vectors.index, parts, sum_dz, sum_dz_xhat, *self.scalars,
            *p.shape, p.channels, *vectors.strides, p.per, p.splits, p.blocks,
            ACTIVATION=self.activation, **p.constants,
        )  # fmt: skip
        if parts is not None:
            blocks = -(-p.channels // plan.MERGE_CHANNELS)
            merge_sums_kernel[(blocks * groups,)](
                parts, vectors.index, sum_dz, sum_dz_xhat, p.channels, p.splits, blocks, **_MERGE
            )
        return sum_dz, sum_dz_xhat

    def apply(
        self,
        means: tuple[Tensor, Tensor] | None,
        weights: Tensor | None,
        need_dz: bool,
        *,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """dx and dz from the means of dx̂ and dx̂·x̂, or from Σ dz and Σ dz·x̂ (`sums`)."""
        frame, vectors = self.frame, self.vectors
        p = frame.streamed(vectors.index)
        results = self.results(need_dz)
        backward_apply_kernel[p.grid](
            *self.data, *results, *vectors.pointers, *(means or (None, None)), vectors.index, frame.weights(weights),
            *self.scalars, float(frame.n * frame.s), *p.shape, p.channels, p.positions, *vectors.strides, p.per,
            p.blocks, ACTIVATION=self.activation, SUMS=sums, **p.constants,
        )  # fmt: skip
        return self.returned(*results)


def train_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    need_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dγ, dβ and dz: in one launch where a program can hold its channels."""
    call = _Backward(dy, x, residual, y, mean, mean_low, var, weight, bias, None, eps, activation, negative_slope)
    frame = call.frame
    with on_device(x):
        p = frame.at_once(2)
        if p is None:
            dbias, dweight = call.reduce(1)
            dx, dz = call.apply((dbias, dweight), None, need_dz, sums=True)
            return dx, dweight, dbias, dz
        dbias, dweight = frame.vectors(2, p.channels)
        results = call.results(need_dz)
        backward_once_kernel[p.grid](
            *call.data, *results, *call.vectors.pointers, dbias, dweight, *call.scalars, float(frame.n * frame.s),
            *p.shape, p.channels, p.blocks, ACTIVATION=activation, **p.constants,
        )  # fmt: skip
        dx, dz = call.returned(*results)
        return dx, dweight, dbias, dz


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
    need_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, Σ dz·x̂, Σ dz and dz with the statistics held: x and dy are read once."""
    call = _Backward(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    with on_device(x):
        results = call.results(need_dz)
        sum_dz, sum_dz_xhat = call.reduce(groups, *results)
        dx, dz = call.returned(*results)
        return dx, sum_dz_xhat, sum_dz, dz


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    groups: int,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Σ dz and Σ dz·x̂."""
    call = _Backward(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    with on_device(x):
        return call.reduce(groups)


def backward_apply(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_dxhat: Tensor | None,
    mean_dxhat_xhat: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    need_dz: bool,
) -> tuple[Tensor, Tensor]:
    """dx from the means of dx̂ and dx̂·x̂, and dz."""
    call = _Backward(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    with on_device(x):
        if mean_dxhat is None or mean_dxhat_xhat is None:
            return call.apply(None, None, need_dz)
        means = mean_dxhat.to(torch.float32).contiguous(), mean_dxhat_xhat.to(torch.float32).contiguous()
        return call.apply(means, weights, need_dz)


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    m: int,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """Move the running statistics, which are contiguous, in one launch."""
    if torch._C._current_graph_task_id() != -1:
        return
    if momentum is None and num_batches_tracked is None:
        raise RuntimeError("update_running_ expects num_batches_tracked where momentum is None, got None for both.")
    with on_device(running_mean):
        update_running_kernel[(1,)](
            running_mean, running_var, num_batches_tracked, mean.contiguous(), mean_low.contiguous(),
            var.contiguous(), count, m, 0.0 if momentum is None else momentum, running_mean.numel(),
            SKIP=skip_nonfinite, CUMULATIVE=momentum is None, BLOCK=_RUNNING_BLOCK, num_warps=4,
        )  # fmt: skip
    changed = (
        [running_mean, running_var] if num_batches_tracked is None else [running_mean, running_var, num_batches_tracked]
    )
    torch.autograd.graph.increment_version(changed)


def start_one_kernel(device: torch.device) -> None:
    """Compile and start the smallest kernel there is: where that fails, so do the others."""
    running_mean, running_var, mean, mean_low, var = torch.zeros(5, 1, device=device).unbind()
    update_running_(running_mean, running_var, None, mean, mean_low, var, 2, None, 0.5, False)
