"""The batch's statistics by parts: moments, what a layer does with them, then normalize.

Between the halves stands what the fused operator has no place for: other processes' moments, groups of samples,
weights, a correction of γ and β.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm import distributed
from batchnorm.ops import eager
from batchnorm.ops.derivatives import (
    Gradients,
    below_autograd,
    differentiable_gradients,
    keep_for_activation,
    like,
    train_gradients,
)

_normalize = torch.ops.batchnorm.normalize.default
_backward_reduce = torch.ops.batchnorm.backward_reduce.default
_backward_apply = torch.ops.batchnorm.backward_apply.default


class BatchStatistics(NamedTuple):
    """What `moments` found, over all processes where there are several.

    count and effective_count are scalars (or `[K]`); mean, mean_low and the biased var are `[C]` (or `[K, C]`). With
    weights, count is their sum V₁, and effective_count is V₁²/V₂, whose n/(n - 1) makes var unbiased; else both are m.
    """

    count: Tensor  # type: ignore[assignment]  # a tuple's method of this name is not needed
    mean: Tensor
    mean_low: Tensor
    var: Tensor
    effective_count: Tensor


def statistics_by_parts(
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    peers: distributed.Peers | None,
    moments: Callable[..., Any],
) -> BatchStatistics:
    """Statistics of x from an implementation of `moments`, joined over the processes where there are several."""
    count, mean, mean_low, m2 = moments(x, index, weights, groups)
    squares = count if weights is None else eager.count_values(x, index, weights.to(count.dtype).square(), groups)
    if peers is not None:
        if x.numel() == 0:  # a process without values takes part in backward too
            mean_low = mean_low + x.sum().to(mean_low.dtype)
        count, mean, mean_low, m2, squares = distributed.merge_moments(count, mean, mean_low, m2, squares, peers)
    var = (m2 / eager.positive(count).unsqueeze(-1)).to(m2.dtype)
    effective_count = count if weights is None else count.square() / eager.positive(squares)
    return BatchStatistics(count, mean, mean_low, var, effective_count)


class FiniteFunction(torch.autograd.Function):
    """x with zeros for NaN and infinity, whose gradient passes as it is: nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Replace what is not finite."""
        return finite(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Pass the gradient."""
        return dy


def finite(x: Tensor) -> Tensor:
    """x as it is normalized where some positions do not count, which may hold anything.

    Sums in backward take in every position, and 0·NaN is NaN. A position that does count and is not finite has made
    the statistics NaN, and with them y.
    """
    return x.nan_to_num(0.0, 0.0, 0.0)


class PartsFunction(torch.autograd.Function):
    """y of `normalize` under autograd, with statistics that are x's own.

    Backward is the two halves, with one collective between them where there are several processes. It gives the
    gradient of the sum of all processes' losses for x; those for weight and bias stay local.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: BatchStatistics,
        index: Tensor | None,
        weights: Tensor | None,
        groups: int,
        peers: distributed.Peers | None,
        attributes: tuple[float, str, float],
    ) -> Tensor:
        """Compute y, and keep what backward needs."""
        count, mean, mean_low, var, _ = statistics
        with below_autograd():
            y: Tensor = _normalize(x, mean, mean_low, var, weight, bias, residual, index, *attributes)
        kept = keep_for_activation(residual, y, attributes[1], attributes[2])
        ctx.save_for_backward(x, *kept, mean, mean_low, var, weight, bias, index, weights, count)
        ctx.groups, ctx.peers, ctx.attributes = groups, peers, attributes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """First derivative by the operators, higher ones through plain torch operations."""
        *kept, index, weights, count = ctx.saved_tensors
        groups, peers, needs = ctx.groups, ctx.peers, ctx.needs_input_grad[:4]
        if dy is None:
            if peers is None:
                return (None,) * 10
            dy = torch.zeros_like(kept[0])  # the others wait for this process's sums
        if torch.is_grad_enabled():
            assert kept[3] is not None
            by_row = kept[3].dim() == 2  # else index picks rows of weight and bias alone

            def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                rows, number = (index, groups) if by_row else (None, 1)
                return statistics_by_parts(x, rows, weights, number, peers, eager.moments)[1:4]

            gradients = differentiable_gradients(dy, tuple(kept), needs, ctx.attributes, statistics, index)
        else:
            with below_autograd():
                if index is None and weights is None and peers is None:
                    gradients = train_gradients(dy, tuple(kept), needs, ctx.attributes)
                else:
                    gradients = _gradients_by_parts(
                        dy, tuple(kept), index, weights, count, groups, peers, needs, ctx.attributes
                    )
        return *gradients, None, None, None, None, None, None


def _gradients_by_parts(
    dy: Tensor,
    kept: tuple[Tensor | None, ...],
    index: Tensor | None,
    weights: Tensor | None,
    count: Tensor,
    groups: int,
    peers: distributed.Peers | None,
    needs: tuple[bool, ...],
    attributes: tuple[float, str, float],
) -> Gradients:
    mean, weight, bias = kept[3], *kept[6:]
    needs_x, needs_weight, needs_bias, needs_residual = needs
    need_dz = needs_residual and attributes[1] != "none"
    assert mean is not None
    sum_dz, sum_dz_xhat = _backward_reduce(dy, *kept, index, groups, *attributes)
    dx = dz = None
    if needs_x or need_dz:
        # Σ dx̂ and Σ dx̂·x̂, over all rows that share a statistic
        sums = torch.stack([sum_dz, sum_dz_xhat]).to(count.dtype)
        if weight is not None:
            sums = sums * weight
        if mean.dim() < sum_dz.dim():
            sums = sums.sum(1)
        if peers is not None:
            sums = distributed.sum_over(sums, peers)
        means = (sums / eager.positive(count).unsqueeze(-1)).to(sum_dz.dtype).unbind()
        dx, dz = _backward_apply(dy, *kept, *means, index, weights, *attributes, need_dz)
    return (
        dx if needs_x else None,
        like(sum_dz_xhat, weight) if needs_weight else None,
        like(sum_dz, bias) if needs_bias else None,
        (dz if need_dz else dy) if needs_residual else None,
    )
