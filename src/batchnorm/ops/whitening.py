"""Whitening by groups of channels (IterNorm), in plain torch operations that can be differentiated at will.

Rows are `[C, m]`: every value of each channel. A group is `size` channels in a row that are whitened together; the
last group has what is left. Equations are named as in the mathematics page, section "Whitening".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops.eager import wide_dtype

# Values that a product sums in one go: matrix products of long rows sum them one after the other.
_BLOCK = 4096


def in_groups(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Views of `rows [C, *]` as `[groups, size, *]`, and as `[1, C % size, *]` where channels are left."""
    whole = rows.shape[0] // size * size
    if whole or not rows.shape[0]:
        yield rows[:whole].unflatten(0, (whole // size, size))
    if whole < rows.shape[0]:
        yield rows[whole:].unsqueeze(0)


def join_groups(groups: Sequence[Tensor]) -> Tensor:
    """What `in_groups` cut, as one tensor `[C, *]`."""
    parts = [group.flatten(0, 1) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack_matrices(matrices: Sequence[Tensor]) -> Tensor:
    """The groups' matrices `[groups, d, d]` as `[C, size]`; the rows of a smaller last group end in zeros."""
    size = matrices[0].shape[-1]
    return join_groups([F.pad(matrix, (0, size - matrix.shape[-1])) for matrix in matrices])


def unpack_matrices(packed: Tensor, size: int) -> list[Tensor]:
    """Undo `pack_matrices`."""
    return [group[..., : group.shape[1]] for group in in_groups(packed, size)]


def inverse_square_root(covariance: Tensor, iterations: int) -> Tensor:
    """`P_T/√trΣ`, which tends to `Σ^(-1/2)` with the number of iterations T; for `[groups, d, d]`.

    The published iteration, `P ← ½(3P - P³Σ_N)`, multiplies its rounding errors and diverges after some ten steps. Here
    `Y = PΣ_N` is carried along (the coupled Newton-Schulz iteration; Higham 2008, Functions of Matrices, chapter 6):
    the same P in exact arithmetic and as many products, and it stays where it converged.
    """
    identity = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    trace = (covariance * identity).sum((-2, -1), keepdim=True)
    y = covariance / trace
    p = step = 1.5 * identity - 0.5 * y  # from P = I
    for _ in range(iterations - 1):
        y = y @ step
        step = 1.5 * identity - 0.5 * (p @ y)
        p = step @ p
    return p * trace.rsqrt()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ rightᵀ` of `[groups, d, m]`, summed in blocks."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return left @ right.mT  # a graph for every size, or for export
    blocks = zip(left.split(_BLOCK, dim=-1), right.split(_BLOCK, dim=-1), strict=True)
    first, *others = (a @ b.mT for a, b in blocks)
    return sum(others, start=first)


class Moments(NamedTuple):
    """Deviations `[C, m]` from `origin [C, 1]`, their mean `low [C, 1]`, and the groups' `matrices`.

    The mean is `origin + low`: deviations are measured from a rounded mean, a constant, and what it lost is `low`,
    which enters vectors and small matrices alone. So a large mean costs no accuracy, and there is one tensor of x's
    size. Derivatives run through `low`. `effective_count`, with weights, is V₁²/V₂: how many values they stand for.
    """

    deviations: Tensor
    origin: Tensor
    low: Tensor
    matrices: list[Tensor]
    effective_count: Tensor | None


def batch_whitening(rows: Tensor, weights: Tensor | None, size: int, eps: float, iterations: int) -> Moments:
    """What whitens `rows [C, m]` by their own statistics; `weights [m]` say how much each position counts."""
    count: Tensor | None = None
    divisor: Tensor | int = rows.shape[1]
    if weights is not None:
        # What does not count may be anything; 0·NaN would be NaN, here and in backward.
        rows = torch.where((weights != 0) | rows.isfinite(), rows, 0.0)
        tiny = torch.finfo(weights.dtype).tiny
        divisor = weights.sum().clamp_min(tiny)
        count = weights.sum().square() / weights.square().sum().clamp_min(tiny)
    elif not torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors there
        divisor = max(rows.shape[1], 1)

    def weighted(t: Tensor) -> Tensor:
        return t if weights is None else t * weights

    origin = weighted(rows.detach()).sum(1, keepdim=True) / divisor
    deviations = rows - origin
    low = weighted(deviations).sum(1, keepdim=True) / divisor
    matrices = []
    for group, counted, group_low in zip(
        in_groups(deviations, size), in_groups(weighted(deviations), size), in_groups(low, size), strict=True
    ):
        noise = eps * torch.eye(group.shape[1], dtype=rows.dtype, device=rows.device)
        covariance = _product(counted, group) / divisor - group_low @ group_low.mT + noise
        matrices.append(inverse_square_root(covariance, iterations))
    return Moments(deviations, origin, low, matrices, count)


def apply_whitening(
    deviations: Tensor,
    low: Tensor | None,
    matrices: Sequence[Tensor],
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`γ·W·(deviations - low) + β`, `[C, m]`: one product, since γ, low and β go into the small matrices."""

    def columns(vector: Tensor | None) -> Sequence[Tensor | None]:
        if vector is None:
            return [None] * len(matrices)
        return list(in_groups(vector.to(deviations.dtype).reshape(-1, 1), size))

    results = []
    for group, matrix, group_low, gamma, beta in zip(
        in_groups(deviations, size), matrices, columns(low), columns(weight), columns(bias), strict=True
    ):
        scaled = matrix if gamma is None else gamma * matrix
        shift = beta
        if group_low is not None:
            shift = -(scaled @ group_low) if beta is None else torch.baddbmm(beta, scaled, group_low, alpha=-1.0)
        results.append(scaled @ group if shift is None else torch.baddbmm(shift, scaled, group))
    return join_groups(results)


def _move(
    running_mean: Tensor,
    running_whitening: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    whitening: Tensor,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    wide = wide_dtype(mean)
    n = mean.new_full((), 2.0) if count is None else count
    moves = n > 0
    if skip_nonfinite:
        moves = moves & mean.isfinite().all() & whitening.isfinite().all()
    rate: Tensor | float | None = momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(moves)
        if momentum is None:
            rate = 1.0 / num_batches_tracked.clamp_min(1).to(wide)
    assert rate is not None
    for running, new, moving in ((running_mean, mean, moves), (running_whitening, whitening, moves & (n > 1))):
        old = running.to(wide)
        running.copy_(torch.where(moving, old * (1.0 - rate) + new.to(wide) * rate, old))


@torch.library.custom_op(
    "batchnorm::update_whitening_",
    mutates_args=("running_mean", "running_whitening", "num_batches_tracked"),
    schema="(Tensor(a!) running_mean, Tensor(b!) running_whitening, Tensor(c!)? num_batches_tracked, Tensor mean, "
    "Tensor whitening, Tensor? count, float? momentum, bool skip_nonfinite) -> ()",
)
def _update_whitening_(
    running_mean: Tensor,
    running_whitening: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    whitening: Tensor,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    # Asked when it runs, not when it is traced: activation checkpointing runs forward again inside a backward.
    if torch._C._current_graph_task_id() == -1:
        _move(running_mean, running_whitening, num_batches_tracked, mean, whitening, count, momentum, skip_nonfinite)


@_update_whitening_.register_fake
def _(*_: object) -> None:
    pass


def update_whitening_(
    running_mean: Tensor,
    running_whitening: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    whitening: Tensor,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    """Move the running mean `[C]` and whitening matrices `[C, size]` toward one batch's, once.

    `running ← (1 - momentum)·running + momentum·batch`. `count` is the number of values per
    channel where that is not known to be more than one: none moves nothing, one moves the mean alone. Nothing moves
    inside a backward pass, nor, with `skip_nonfinite`, for a batch whose statistics are not finite.
    """
    arguments = (
        running_mean,
        running_whitening,
        num_batches_tracked,
        mean.detach(),
        whitening.detach(),
        count,
        momentum,
        skip_nonfinite,
    )
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        _move(*arguments)  # torch's own operations alone: the program loads where this library is not installed
    elif not torch._C._are_functorch_transforms_active():
        _update_whitening_(*arguments)
    else:
        try:
            _move(*arguments)
        except RuntimeError as error:
            raise RuntimeError(_checks.CAPTURED_STATISTICS) from error
