"""Whitening of groups of channels (IterNorm), in plain torch operations with derivatives of any order.

`values` are `[C, m]`, all values of each channel. A group is `size` consecutive channels that are whitened together.
The last group may be smaller. `whitening_function` is faster in eager mode, and uses these operations for second
derivatives. The mathematics page has the equations in section "Whitening".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.ops import eager
from batchnorm.ops.routes import update_once

# The number of values that one product sums. Longer products would lose accuracy, because they sum one by one.
LONGEST_SUM = 4096


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


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context that disables autocast, which would compute the products in half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


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
    return p / trace.sqrt()  # the derivative of rsqrt has a third power, which underflows for large values


def summed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ rightᵀ` of `[groups, d, m]`, summed in blocks."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return left @ right.mT  # a compiled or exported graph must not depend on the size
    blocks = zip(left.split(LONGEST_SUM, dim=-1), right.split(LONGEST_SUM, dim=-1), strict=True)
    first, *others = (a @ b.mT for a, b in blocks)
    return sum(others, start=first)


class Settings(NamedTuple):
    """The number of channels in a group, the constant on the covariance's diagonal, and the number of iterations."""

    size: int
    eps: float
    iterations: int


class Held(NamedTuple):
    """Running statistics without gradient: the mean `[C]` and the packed whitening matrices `[C, size]`."""

    mean: Tensor
    packed: Tensor


class Whitening(NamedTuple):
    """The map from x to `W·((x - mean) - low)`: `mean` and `low` are `[C]`, and `matrices` are those of the groups.

    `mean` is rounded and a constant. `low` is the rounding error, and enters only vectors and small matrices. A large
    mean therefore costs no accuracy, and one tensor of x's size is enough. The derivative of the mean is that of `low`.
    With weights, `effective_count` is V₁²/V₂.
    """

    mean: Tensor
    low: Tensor
    matrices: list[Tensor]
    effective_count: Tensor | None


def covariances(products: Sequence[Tensor], low: Tensor, settings: Settings) -> list[Tensor]:
    """Return `Σ` of each group from the means of `(x - mean)(x - mean)ᵀ`, `[groups, d, d]`, and `low [C]`."""
    found = []
    for product, column in zip(products, in_groups(low.unsqueeze(1), settings.size), strict=True):
        noise = settings.eps * torch.eye(product.shape[1], dtype=low.dtype, device=low.device)
        found.append(product - column @ column.mT + noise)
    return found


def batch_whitening(values: Tensor, weights: Tensor | None, settings: Settings) -> tuple[Tensor, Whitening]:
    """Return the deviations `values - mean` of `values [C, m]`, and their whitening by their own statistics.

    `weights [m]` are those of the positions.
    """
    count: Tensor | None = None
    divisor: Tensor | int = max(values.shape[1], 1)
    if weights is not None:
        tiny = torch.finfo(weights.dtype).tiny
        divisor = eager.positive(weights.sum())  # not tiny: a gradient divided by it would overflow
        count = weights.sum().square() / weights.square().sum().clamp_min(tiny)

    def weighted(t: Tensor) -> Tensor:
        return t if weights is None else t * weights

    origin = weighted(values.detach()).sum(1, keepdim=True) / divisor
    deviations = values - origin
    low = (weighted(deviations).sum(1, keepdim=True) / divisor).squeeze(1)
    counted = in_groups(weighted(deviations), settings.size)
    pairs = zip(counted, in_groups(deviations, settings.size), strict=True)
    products = [summed_product(*pair) / divisor for pair in pairs]
    matrices = [inverse_square_root(c, settings.iterations) for c in covariances(products, low, settings)]
    return deviations, Whitening(origin.squeeze(1), low, matrices, count)


def running_where_single(found: Whitening, held: Held, size: int) -> Whitening:
    """Replace a weighted batch's whitening by the running one if at most one value counts.

    The count becomes 0, which updates nothing.
    """
    assert found.effective_count is not None
    single = found.effective_count <= 1
    running = unpack_matrices(held.packed, size)
    return Whitening(
        torch.where(single, held.mean, found.mean),
        torch.where(single, 0.0, found.low),
        [torch.where(single, *pair) for pair in zip(running, found.matrices, strict=True)],
        torch.where(single, 0.0, found.effective_count),
    )


def affine_map(found: Whitening, weight: Tensor | None, bias: Tensor | None, size: int) -> tuple[list[Tensor], Tensor]:
    """Return the matrices `γ·W` and the shift `β - γ·W·low`, `[C, 1]`, which map `x - mean` to y."""
    gamma, beta = (None if t is None else t.to(found.mean.dtype).unsqueeze(1) for t in (weight, bias))
    matrices = found.matrices
    if gamma is not None:
        matrices = [group * matrix for group, matrix in zip(in_groups(gamma, size), matrices, strict=True)]
    shift = join_groups(
        [matrix @ group for group, matrix in zip(in_groups(found.low.unsqueeze(1), size), matrices, strict=True)]
    )
    return matrices, -shift if beta is None else beta - shift


def whiten(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    held: Held | None,
    settings: Settings,
    training: bool,
) -> tuple[Tensor, Whitening]:
    """Return y in the statistics' dtype, and how x was whitened.

    In training, this is by the batch's statistics with `weights [N, *S]`. `held` then replaces them where at most one
    value counts. In evaluation, it is by `held`.
    """
    channels_first = x.movedim(1, 0)
    values = channels_first.flatten(1).to(eager.statistics_dtype(x))
    if training:
        deviations, found = batch_whitening(values, None if weights is None else weights.flatten(), settings)
        if held is not None and weights is not None:
            found = running_where_single(found, held, settings.size)
            deviations = values - found.mean.unsqueeze(1)
    else:
        assert held is not None
        found = held_whitening(held, settings.size)
        deviations = values - held.mean.unsqueeze(1)
    matrices, shift = affine_map(found, weight, bias, settings.size)
    groups = zip(matrices, in_groups(deviations, settings.size), strict=True)
    shifts = in_groups(shift, settings.size)
    y = join_groups([torch.baddbmm(one, *pair) for one, pair in zip(shifts, groups, strict=True)])
    return y.reshape(channels_first.shape).movedim(0, 1), found


def held_whitening(held: Held, size: int) -> Whitening:
    """Return the whitening by running statistics."""
    return Whitening(held.mean, torch.zeros_like(held.mean), unpack_matrices(held.packed, size), None)


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
    if torch.compiler.is_exporting():
        _update(*arguments)  # torch's own operations only, so that the program loads without this library
    else:
        update_once(torch.ops.batchnorm.update_whitening_, _update, arguments)
