"""Normalization by the batch's statistics in two halves: moments, then normalize.

Some algorithms act between the halves, and cannot use the fused operator. They merge the moments of other processes,
form groups of samples, weight values, or correct γ and β.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import distributed
from batchnorm.ops import eager, strict
from batchnorm.ops.derivatives import (
    Gradients,
    below_autograd,
    differentiable_gradients,
    keep,
    needed_gradients,
    train_gradients,
)
from batchnorm.ops.schemas import Attributes, Kept, Vectors

_normalize = torch.ops.batchnorm.normalize.default
_backward_reduce = torch.ops.batchnorm.backward_reduce.default
_backward_apply = torch.ops.batchnorm.backward_apply.default


class BatchStatistics(NamedTuple):
    """A batch's statistics, over all processes if there are several.

    count and effective_count are scalars (or `[K]`); mean, mean_low and the biased var are `[C]` (or `[K, C]`). Without
    weights, both counts are m. With weights, count is their sum V₁, and effective_count is n = V₁²/V₂, for which
    var·n/(n - 1) is unbiased.
    """

    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not needed
    mean: Tensor
    mean_low: Tensor
    var: Tensor
    effective_count: Tensor


class Grouping(NamedTuple):
    """How a batch's values are grouped, weighted and shared among processes; `BatchStatistics` has the count."""

    index: Tensor | None  # type: ignore[assignment]  # a tuple's methods of these names are not needed
    weights: Tensor | None
    count: Tensor  # type: ignore[assignment]
    groups: int
    peers: distributed.Peers | None = None


def statistics_by_parts(
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    peers: distributed.Peers | None,
    moments: Callable[..., Any],
) -> BatchStatistics:
    """Return the statistics of x from an implementation of `moments`, merged over all processes."""
    count, mean, mean_low, m2 = moments(x, index, weights, groups)
    squares = count if weights is None else eager.count_values(x, index, weights.to(count.dtype).square(), groups)
    if peers is not None:
        if x.numel() == 0:  # so that a process without values takes part in backward, too
            mean_low = mean_low + x.sum().to(mean_low.dtype)
        own = distributed.PairMoments(count, mean, mean_low, m2, squares)
        count, mean, mean_low, m2, squares = distributed.merge_moments(own, peers)
    var = (m2 / eager.positive(count).unsqueeze(-1)).to(m2.dtype)
    effective_count = count if weights is None else count.square() / eager.positive(squares)
    return BatchStatistics(count, mean, mean_low, var, effective_count)


def at_once(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    shared: bool,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    attributes: Attributes,
) -> tuple[Tensor, BatchStatistics]:
    """Return y and the statistics by one operator.

    Raises:
        strict.RefusedError: the operator does not accept the arguments. x may be infinite or NaN where a weight is 0.
    """
    try:
        y, *found = strict.parts_forward(x, weight, bias, residual, index, weights, groups, shared, *attributes)
    except RuntimeError as error:
        raise strict.RefusedError from error
    return y, BatchStatistics(*found)


class FiniteFunction(torch.autograd.Function):
    """`finite` under autograd: the gradient passes unchanged, and nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Replace NaN and infinity."""
        return finite(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Pass the gradient."""
        return dy


def finite(x: Tensor) -> Tensor:
    """Return x with zeros instead of NaN and infinity, which may be at positions that do not count.

    Sums in backward include every position, and 0·NaN is NaN. A non-finite value at a position that counts has already
    made the statistics and y NaN.
    """
    return x.nan_to_num(0.0, 0.0, 0.0)


class PartsFunction(torch.autograd.Function):
    """y of `normalize` under autograd, with statistics that depend on x.

    Backward has two halves, with one collective between them if there are several processes. The gradient of x is that
    of the sum of all processes' losses. The gradients of weight and bias are local.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: list[BatchStatistics],
        shared: bool,
        index: Tensor | None,
        weights: Tensor | None,
        groups: int,
        peers: distributed.Peers | None,
        attributes: Attributes,
    ) -> Tensor:
        """Compute y, and save tensors for backward. Without statistics, also compute and append them."""
        if statistics:
            _, mean, mean_low, var, _ = statistics[0]
            with below_autograd():
                y: Tensor = _normalize(x, mean, mean_low, var, weight, bias, residual, index, *attributes)
        else:
            y, found = at_once(x, weight, bias, residual, shared, index, weights, groups, attributes)
            statistics.append(found)
        count, mean, mean_low, var, _ = statistics[0]
        vectors = Vectors(mean, mean_low, var, weight, bias)
        keep(ctx, x, residual, y, vectors, attributes, index, weights, count)
        ctx.groups, ctx.peers = groups, peers
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by the operators, higher ones through plain torch operations."""
        *tensors, index, weights, count = ctx.saved_tensors
        kept, groups, peers, needs = Kept(*tensors), ctx.groups, ctx.peers, ctx.needs_input_grad[:4]
        if dy is None:
            if peers is None:
                return (None,) * 11
            dy = torch.zeros_like(kept.x)  # the other processes wait for this process's sums
        gradients = _gradients(dy, kept, Grouping(index, weights, count, groups, peers), needs, ctx.attributes)
        return *gradients, None, None, None, None, None, None, None


def _gradients(
    dy: Tensor, kept: Kept, grouping: Grouping, needs: tuple[bool, ...], attributes: Attributes
) -> Gradients:
    """Return the gradients by the operators of the contract, or as differentiable functions."""
    index, weights, count, groups, peers = grouping
    if not torch.is_grad_enabled():
        with below_autograd():
            if index is None and weights is None and peers is None:
                return train_gradients(dy, kept, needs, attributes)
            return _gradients_by_parts(dy, kept, grouping, needs, attributes)
    by_row = kept.mean.dim() == 2  # otherwise, index selects only rows of weight and bias
    mean, mean_low, var = kept.mean, kept.mean_low, kept.var
    assert mean_low is not None

    def statistics(x: Tensor) -> tuple[Tensor, ...]:
        rows, number = (index, groups) if by_row else (None, 1)
        found = statistics_by_parts(x, rows, weights, number, peers, eager.moments)[1:4]
        counted = count.unsqueeze(-1) > 0  # the statistics of empty groups are constants
        held = (mean, mean_low, var)
        return tuple(torch.where(counted, *pair) for pair in zip(found, held, strict=True))

    return differentiable_gradients(dy, kept, needs, attributes, statistics, index)


def _gradients_by_parts(
    dy: Tensor, kept: Kept, grouping: Grouping, needs: tuple[bool, ...], attributes: Attributes
) -> Gradients:
    index, weights, count, groups, peers = grouping
    need_dz = needs[3] and attributes.activation != "none"
    if peers is None and (needs[0] or need_dz) and strict.takes_parts(dy, *kept, index, weights):
        dx, sum_dz_xhat, sum_dz, dz = strict.parts_backward(
            dy, *kept, count, index, weights, groups, *attributes, need_dz
        )
        return needed_gradients(needs, kept, attributes, dy, dx, sum_dz_xhat, sum_dz, dz)
    sum_dz, sum_dz_xhat = _backward_reduce(dy, *kept, index, groups, *attributes)
    dx = dz = None
    if needs[0] or need_dz:
        # Σ dx̂ and Σ dx̂·x̂, over all rows that share statistics
        sums = torch.stack([sum_dz, sum_dz_xhat]).to(count.dtype)
        if kept.weight is not None:
            sums = sums * kept.weight
        if kept.mean.dim() < sum_dz.dim():
            sums = sums.sum(1)
        if peers is not None:
            sums = distributed.sum_over(sums, peers)
        count = count.unsqueeze(-1)
        means = torch.where(count > 0, sums / eager.positive(count), 0.0).to(sum_dz.dtype).unbind()
        dx, dz = _backward_apply(dy, *kept, *means, index, weights, *attributes, need_dz)
    return needed_gradients(needs, kept, attributes, dy, dx, sum_dz_xhat, sum_dz, dz)


def _operator_gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    eps: float,
    number: int,
    parameter: float,
    needs: list[bool],
) -> Gradients:
    """Compute gradients for the node in C++ as `strict.py` does for statistics of all values."""
    kept, attributes = Kept(x, residual, y, mean, mean_low, var, weight, bias), strict.named((eps, number, parameter))
    return _gradients(dy, kept, Grouping(index, weights, count, groups), tuple(needs), attributes)


strict.define_gradients(
    "strict_parts_gradients(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor mean, Tensor mean_low, "
    "Tensor var, Tensor? weight, Tensor? bias, Tensor count, Tensor? index, Tensor? weights, int groups, float eps, "
    "int activation, float negative_slope, bool[4] needs)",
    _operator_gradients,
)
