"""The operators, which launch kernels. Importing this module imports Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops.schemas import Attributes, Batch, Kept, Running, Vectors, grouped
from batchnorm.ops.triton.frame import BY_CHANNEL, Frame, KernelVectors, kernel_weights, on_device
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
from batchnorm.ops.triton.prepared import Scratch, merge, prepared, scratch_of
from batchnorm.ops.triton.tiling import Tiling
from batchnorm.ops.triton.variants import Kernel, Launch, Start, run

_MOMENTS, _MERGE_MOMENTS = Kernel(moments_kernel), Kernel(merge_moments_kernel)
_NORMALIZE, _FORWARD_ONCE = Kernel(normalize_kernel), Kernel(forward_once_kernel)
_REDUCE, _MERGE_SUMS = Kernel(backward_reduce_kernel), Kernel(merge_sums_kernel)
_APPLY, _BACKWARD_ONCE = Kernel(backward_apply_kernel), Kernel(backward_once_kernel)
_UPDATE_RUNNING, _SMALLEST = Kernel(update_running_kernel), Kernel(smallest_kernel)

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_RUNNING_BLOCK = 1024

# The mean, mean_low and a batch's biased variance or sum of squared deviations.
Statistics = tuple[Tensor, Tensor, Tensor]

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


def _launch_moments(
    frame: Frame, x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int, results: Statistics,
    *, variance: bool,
) -> Tensor | None:  # fmt: skip
    """Compute mean, mean_low, and m2 or the biased variance. Return count with an index."""
    t = frame.streamed(index, by_sample=True)
    values = index is not None and frame.s == 1  # the parts of such samples would be larger than x
    if values:
        parts: Tensor | None = x
    else:
        scratch = scratch_of(frame, t, index, 4)
        parts = scratch.parts
        _moments_start(t, x, weights, results, scratch, variance=variance).run()
    if index is None:
        return None
    count = torch.empty(groups, dtype=torch.float64, device=frame.device)
    if weights is None:
        sample_counts = torch.full((frame.n,), frame.s, dtype=torch.float64, device=frame.device)
    else:
        sample_counts = weights.reshape(frame.n, -1).sum(1, dtype=torch.float64)
    merge(_MERGE_MOMENTS, t, groups, dtype=_DTYPES[frame.dtype], VARIANCE=variance, VALUES=values).start(
        (parts, index, sample_counts, count, *results), ()
    )
    return count


def _moments_start(
    t: Tiling, x: Tensor, weights: Tensor | None, results: Statistics, scratch: Scratch, *, variance: bool
) -> Start:
    parts, counters, rows = scratch
    launch = prepared(_MOMENTS, t, (t.per, t.splits, rows, t.blocks), VARIANCE=variance)
    return Start(launch, (x, weights, parts, counters, *results), (), (parts, counters))


@_launcher
def moments(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, mean, mean_low and m2."""
    frame = Frame.of(x)
    x, weights, index = frame.read(x), kernel_weights(weights), None if index is None else index.contiguous()
    mean, mean_low, m2 = frame.row_vectors(3, index, groups)
    count = _launch_moments(frame, x, index, weights, groups, (mean, mean_low, m2), variance=False)
    if count is None:
        count = x.new_full((), frame.m, dtype=torch.float64) if weights is None else weights.sum(dtype=torch.float64)
    return count, mean, mean_low, m2


class Update(NamedTuple):
    """The running statistics that a forward pass updates, and their momentum."""

    running: tuple[Tensor | None, ...]
    momentum: float


NO_UPDATE = Update((None, None, None), 0.0)


@_launcher
def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, attributes: Attributes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean, mean_low and the biased variance, in one launch if a program can hold its channels."""
    return _train_forward(x, weight, bias, residual, attributes, NO_UPDATE)


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
        return _train_forward(x, weight, bias, residual, attributes, NO_UPDATE)
    found = _train_forward(x, weight, bias, residual, attributes, Update(running, momentum))
    torch.autograd.graph.increment_version([t for t in running if t is not None])
    return found


def _train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    attributes: Attributes,
    update: Update,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    frame = Frame.of(x)
    y, (mean, mean_low, var) = frame.result(), frame.row_vectors(3)
    weight, bias = None if weight is None else weight.contiguous(), None if bias is None else bias.contiguous()
    data = (frame.read(x), frame.read_if(residual), y)
    run(forward(frame, *data, (mean, mean_low, var), weight, bias, attributes, update))
    return frame.returned(y), mean, mean_low, var


def forward(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    attributes: Attributes,
    update: Update,
) -> list[Start]:
    """Return the launches that compute y and the batch's mean, mean_low and biased variance."""
    t = frame.at_once(1)
    if t is None:
        t, vectors = frame.streamed(), KernelVectors((*statistics, weight, bias), None, BY_CHANNEL)
        return [
            _moments_start(t, x, None, statistics, scratch_of(frame, t, None, 4), variance=True),
            normalization(frame, x, residual, y, vectors, attributes, update),
        ]
    eps, activation, negative_slope = attributes
    tensors = (x, residual, y, *statistics, weight, bias, *update.running)
    floats = (eps, negative_slope, frame.m, update.momentum)
    return [Start(prepared(_FORWARD_ONCE, t, (t.blocks,), ACTIVATION=activation), tensors, floats)]


def normalization(
    frame: Frame,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    vectors: KernelVectors,
    attributes: Attributes,
    update: Update = NO_UPDATE,
) -> Start:
    """Return the launch that computes y from given statistics."""
    t = frame.streamed(vectors.index)
    eps, activation, negative_slope = attributes
    tensors = (x, residual, y, *vectors.tensors, vectors.index, *update.running)
    floats = (eps, negative_slope, frame.m, update.momentum)
    return Start(prepared(_NORMALIZE, t, (*vectors.sizes, t.per, t.blocks), ACTIVATION=activation), tensors, floats)


@_launcher
def normalize(
    x: Tensor, vectors: Vectors, residual: Tensor | None, index: Tensor | None, attributes: Attributes
) -> Tensor:
    """Return y from given statistics."""
    frame = Frame.of(x)
    y = frame.result()
    given = KernelVectors.of(vectors, index)
    normalization(frame, frame.read(x), frame.read_if(residual), y, given, attributes).run()
    return frame.returned(y)


class Backward:
    """The arguments that all operators of the backward pass share, in the form that kernels take.

    Args:
        frame: The frame of x.
        data: dy, x, and the residual or y if the activation needs them.
        vectors: The vectors that normalized x.
        attributes: The arguments that are not tensors.
    """

    def __init__(
        self, frame: Frame, data: tuple[Tensor | None, ...], vectors: KernelVectors, attributes: Attributes
    ) -> None:
        self.frame, self.data, self.vectors = frame, data, vectors
        eps, self.activation, negative_slope = attributes
        self.scalars = (eps, negative_slope)

    @classmethod
    def of(cls, dy: Tensor, kept: Kept, index: Tensor | None, attributes: Attributes) -> Backward:
        """Return the arguments of an operator, converted where the kernels need it."""
        frame = Frame.of(kept.x)
        plain = attributes.activation == "none"
        y = None if plain else kept.y
        residual = None if plain or y is not None else kept.residual
        data = (frame.read(dy), frame.read(kept.x), frame.read_if(residual), frame.read_if(y))
        return cls(frame, data, KernelVectors.of(kept.vectors, index), attributes)

    def results(self, need_dz: bool) -> tuple[Tensor, Tensor | None]:
        """Allocate dx, and dz if `need_dz`."""
        return self.frame.result(), self.frame.result() if need_dz else None

    def returned(self, dx: Tensor, dz: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return dx and dz as operators return them."""
        return self.frame.returned(dx), dx.new_empty(0) if dz is None else self.frame.returned(dz)

    def sums(self, groups: int) -> tuple[Tensor, Tensor]:
        """Allocate Σ dz and Σ dz·x̂."""
        sum_dz, sum_dz_xhat = self.frame.row_vectors(2, self.vectors.index, groups)
        return sum_dz, sum_dz_xhat

    def train(self, dx: Tensor, dz: Tensor | None, sums: tuple[Tensor, Tensor]) -> list[Start]:
        """Return the launches for the gradients through batch statistics: one if a program can hold its channels."""
        t = self.frame.at_once(2)
        if t is None:
            return [*self.reduce(1, sums), self.apply(sums, None, dx, dz, from_sums=True)]
        tensors = (*self.data, dx, dz, *self.vectors.tensors, *sums)
        launch = prepared(_BACKWARD_ONCE, t, (t.blocks,), ACTIVATION=self.activation)
        return [Start(launch, tensors, (*self.scalars, self.frame.m))]

    def reduce(
        self, groups: int, sums: tuple[Tensor, Tensor], dx: Tensor | None = None, dz: Tensor | None = None
    ) -> list[Start]:
        """Return the launches for the sums; with constant statistics, also for dx and dz."""
        frame, vectors = self.frame, self.vectors
        t = frame.streamed(vectors.index, by_sample=True)
        parts, counters, rows = scratch_of(frame, t, vectors.index, 2)
        sizes = (*vectors.sizes, t.per, t.splits, rows, t.blocks)
        tensors = (*self.data, dx, dz, *vectors.tensors, vectors.index, parts, counters, *sums)
        launch = prepared(_REDUCE, t, sizes, ACTIVATION=self.activation)
        found = [Start(launch, tensors, self.scalars, (parts, counters))]
        if vectors.index is not None:
            found.append(Start(merge(_MERGE_SUMS, t, groups), (parts, vectors.index, *sums)))
        return found

    def apply(
        self,
        means: tuple[Tensor | None, Tensor | None],
        weights: Tensor | None,
        dx: Tensor,
        dz: Tensor | None,
        *,
        from_sums: bool = False,
    ) -> Start:
        """Return the launch for dx and dz from the means of dx̂ and dx̂·x̂, or from Σ dz and Σ dz·x̂ (`from_sums`)."""
        frame, vectors = self.frame, self.vectors
        t = frame.streamed(vectors.index)
        sizes = (*vectors.sizes, t.per, t.blocks)
        tensors = (*self.data, dx, dz, *vectors.tensors, *means, vectors.index, kernel_weights(weights))
        launch = prepared(_APPLY, t, sizes, ACTIVATION=self.activation, SUMS=from_sums)
        return Start(launch, tensors, (*self.scalars, frame.m))


@_launcher
def train_backward(
    dy: Tensor, kept: Kept, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dγ, dβ and dz."""
    call = Backward.of(dy, kept, None, attributes)
    (dx, dz), (dbias, dweight) = call.results(need_dz), call.sums(1)
    run(call.train(dx, dz, (dbias, dweight)))
    dx, dz = call.returned(dx, dz)
    return dx, dweight, dbias, dz


@_launcher
def normalize_backward(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, Σ dz·x̂, Σ dz and dz with constant statistics; x and dy are read once."""
    call = Backward.of(dy, kept, index, attributes)
    (dx, dz), (sum_dz, sum_dz_xhat) = call.results(need_dz), call.sums(groups)
    run(call.reduce(groups, (sum_dz, sum_dz_xhat), dx, dz))
    dx, dz = call.returned(dx, dz)
    return dx, sum_dz_xhat, sum_dz, dz


@_launcher
def backward_reduce(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes
) -> tuple[Tensor, Tensor]:
    """Return Σ dz and Σ dz·x̂."""
    call = Backward.of(dy, kept, index, attributes)
    sums = call.sums(groups)
    run(call.reduce(groups, sums))
    return sums


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
    call = Backward.of(dy, kept, index, attributes)
    dx, dz = call.results(need_dz)
    if mean_dxhat is None or mean_dxhat_xhat is None:
        call.apply((None, None), None, dx, dz).run()
    else:
        means = mean_dxhat.to(torch.float32).contiguous(), mean_dxhat_xhat.to(torch.float32).contiguous()
        call.apply(means, weights, dx, dz).run()
    return call.returned(dx, dz)


@_launcher
def update_running_(running: Running, batch: Batch, momentum: float | None, skip_nonfinite: bool) -> None:
    """Update the running statistics, which are contiguous, in one launch."""
    if torch._C._current_graph_task_id() != -1:
        return
    if momentum is None and running.num_batches_tracked is None:
        raise RuntimeError(_checks.missing_counter("batchnorm::update_running_"))
    mean, mean_low, var = (t.contiguous() for t in batch[:3])
    running_update(running, (mean, mean_low, var), batch.m, batch.count, momentum, skip_nonfinite).run()
    torch.autograd.graph.increment_version([t for t in running if t is not None])


def running_update(
    running: Sequence[Tensor | None],
    statistics: Statistics,
    m: int,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> Start:
    """Return the launch that updates the running statistics by those of a batch; `Batch` describes m and count."""
    launch = _update_launch(_UPDATE_RUNNING, m, statistics[0].numel(), skip_nonfinite, momentum is None)
    return Start(launch, (*running, *statistics, count), (0.0 if momentum is None else momentum,))


@functools.lru_cache(maxsize=1024)
def _update_launch(kernel: Kernel, m: int, channels: int, skip: bool, cumulative: bool) -> Launch:
    constants = {"SKIP": skip, "CUMULATIVE": cumulative, "BLOCK": _RUNNING_BLOCK, "num_warps": 4}
    return Launch(kernel, (1,), (m, channels), constants)


def start_smallest_kernel(device: torch.device) -> None:
    """Compile and start the smallest kernel, to find out whether the device can run any."""
    out = torch.empty(1, device=device)
    with on_device(out):
        Launch(_SMALLEST, (1,), (0,), {"num_warps": 1}).start((out,), (0.0,))
