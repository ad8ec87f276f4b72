"""Whitening of groups of channels (IterNorm), in plain torch operations with derivatives of any order.

`values` are `[C, m]`, all values of each channel. A group is `size` consecutive channels that are whitened together.
The last group may be smaller. The mathematics page has the equations in section "Whitening".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.ops import eager
from batchnorm.ops.routes import update_once

# The number of values that one product sums. Longer products would lose accuracy, because they sum one by one.
_BLOCK = 4096


def in_groups(values: Tensor, size: int) -> Iterator[Tensor]:
    """Yield views of `values [C, *]` as `[groups, size, *]`, and as `[1, C % size, *]` for remaining channels."""
    whole = values.shape[0] // size * size
    if whole or not values.shape[0]:
        yield values[:whole].unflatten(0, (whole // size, size))
    if whole < values.shape[0]:
        yield values[whole:].unsqueeze(0)


def join_groups(groups: Sequence[Tensor]) -> Tensor:
    """Undo `in_groups`: return one tensor `[C, *]`."""
    parts = [group.flatten(0, 1) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack_matrices(matrices: Sequence[Tensor]) -> Tensor:
    """Return the groups' matrices `[groups, d, d]` as `[C, size]`; the rows of a smaller last group end in zeros."""
    size = matrices[0].shape[-1]
    return join_groups([F.pad(matrix, (0, size - matrix.shape[-1])) for matrix in matrices])


def unpack_matrices(packed: Tensor, size: int) -> list[Tensor]:
    """Undo `pack_matrices`."""
    return [group[..., : group.shape[1]] for group in in_groups(packed, size)]


def inverse_square_root(covariance: Tensor, iterations: int) -> Tensor:
    """Return `P_T/√trΣ` for `[groups, d, d]`; it converges to `Σ^(-1/2)` with the number of iterations T.

    The published iteration, `P ← ½(3P - P³Σ_N)`, amplifies its rounding errors and diverges after about ten steps. This
    one also updates `Y = PΣ_N` (the coupled Newton-Schulz iteration; Higham 2008, Functions of Matrices, chapter 6). It
    computes the same P in exact arithmetic with as many products, and remains stable.
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
    """Return `left @ rightᵀ` of `[groups, d, m]`, summed in blocks."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return left @ right.mT  # a compiled or exported graph must not depend on the size
    blocks = zip(left.split(_BLOCK, dim=-1), right.split(_BLOCK, dim=-1), strict=True)
    first, *others = (a @ b.mT for a, b in blocks)
    return sum(others, start=first)


class BatchWhitening(NamedTuple):
    """Deviations `[C, m]` from `origin [C, 1]`, their mean `low [C, 1]`, and the groups' whitening `matrices`.

    The mean is `origin + low`. `origin` is a rounded mean and a constant. `low` is the rounding error, and enters only
    vectors and small matrices. A large mean therefore costs no accuracy, and one tensor of x's size is enough. The
    derivative of the mean is that of `low`. With weights, `effective_count` is V₁²/V₂.
    """

    deviations: Tensor
    origin: Tensor
    low: Tensor
    matrices: list[Tensor]
    effective_count: Tensor | None


def batch_whitening(values: Tensor, weights: Tensor | None, size: int, eps: float, iterations: int) -> BatchWhitening:
    """Return the whitening of `values [C, m]` by their own statistics, with `weights [m]` for the positions."""
    count: Tensor | None = None
    divisor: Tensor | int = values.shape[1]
    if weights is not None:
        # A position with weight 0 may have any value, and 0·NaN would be NaN, here and in backward.
        values = torch.where((weights != 0) | values.isfinite(), values, 0.0)
        tiny = torch.finfo(weights.dtype).tiny
        divisor = weights.sum().clamp_min(tiny)
        count = weights.sum().square() / weights.square().sum().clamp_min(tiny)
    elif not torch.jit.is_tracing():  # type: ignore[attr-defined]  # sizes are tensors there
        divisor = max(values.shape[1], 1)

    def weighted(t: Tensor) -> Tensor:
        return t if weights is None else t * weights

    origin = weighted(values.detach()).sum(1, keepdim=True) / divisor
    deviations = values - origin
    low = weighted(deviations).sum(1, keepdim=True) / divisor
    matrices = []
    for group, counted, group_low in zip(
        in_groups(deviations, size), in_groups(weighted(deviations), size), in_groups(low, size), strict=True
    ):
        noise = eps * torch.eye(group.shape[1], dtype=values.dtype, device=values.device)
        covariance = _product(counted, group) / divisor - group_low @ group_low.mT + noise
        matrices.append(inverse_square_root(covariance, iterations))
    return BatchWhitening(deviations, origin, low, matrices, count)


def running_where_single(
    found: BatchWhitening, values: Tensor, mean: Tensor, matrices: Sequence[Tensor]
) -> BatchWhitening:
    """Replace the whitening of weighted `values [C, m]` by the running one if at most one value counts.

    The count becomes 0, which updates nothing.
    """
    assert found.effective_count is not None
    single = found.effective_count <= 1
    held = mean.unsqueeze(1)
    return BatchWhitening(
        torch.where(single, values - held, found.deviations),
        torch.where(single, held, found.origin),
        torch.where(single, 0.0, found.low),
        [torch.where(single, running, own) for running, own in zip(matrices, found.matrices, strict=True)],
        torch.where(single, 0.0, found.effective_count),
    )


def apply_whitening(
    deviations: Tensor,
    low: Tensor | None,
    matrices: Sequence[Tensor],
    size: int,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return `γ·W·(deviations - low) + β`, `[C, m]`, by one product, with γ, low and β in the small matrices."""

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


def _update(
    running_mean: Tensor,
    running_whitening: Tensor,
    num_batches_tracked: Tensor | None,
    mean: Tensor,
    whitening: Tensor,
    count: Tensor | None,
    momentum: float | None,
    skip_nonfinite: bool,
) -> None:
    n = mean.new_full((), 2.0) if count is None else count
    checked = (mean, whitening) if skip_nonfinite else ()
    eager.update_toward_(
        (mean, whitening), (running_mean, running_whitening), num_batches_tracked, n, checked, momentum
    )


def _update_outside_backward(*arguments: Any) -> None:
    # Check when the operator runs, not when it is traced, because activation checkpointing repeats it inside backward.
    if torch._C._current_graph_task_id() == -1:
        _update(*arguments)


_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_LIBRARY.define(
    "update_whitening_(Tensor(a!) running_mean, Tensor(b!) running_whitening, Tensor(c!)? num_batches_tracked, "
    "Tensor mean, Tensor whitening, Tensor? count, float? momentum, bool skip_nonfinite) -> ()"
)
_LIBRARY.impl("update_whitening_", _update_outside_backward, "CompositeExplicitAutograd")
torch.library.register_fake("batchnorm::update_whitening_", lambda *_: None, lib=_LIBRARY)


def update_whitening_(*arguments: Any) -> None:
    """Update the running mean `[C]` and whitening matrices `[C, size]` once by those of a batch.

    `running ← (1 - momentum)·running + momentum·batch`. The arguments are those of the operator, without gradient.
    `count` is the number of values per channel if it may be below two, else None. With a count of 0, there is no
    update; with 1, only the mean is updated. There is no update in a backward pass, or, with `skip_nonfinite`, for a
    batch whose statistics are not finite.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        _update(*arguments)  # torch's own operations only, so that the program loads without this library
    else:
        update_once(torch.ops.batchnorm.update_whitening_, _update, arguments)
