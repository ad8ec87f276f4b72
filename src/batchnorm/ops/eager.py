"""The operators in plain torch operations: for every device and layout, without a compiler.

`torch.func`, forward mode and second derivatives differentiate these functions, so all functions are differentiable in
their tensor arguments. Docstrings cite sections of the mathematics page.

Statistics are float64 for float64 x, and float32 otherwise. The mean is a pair, `mean + mean_low`: `mean` is rounded to
x's dtype, so that `x - mean` is exact near it, and `mean_low` is the rounding error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm import _checks
from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.reduce import sum_pairwise, sum_positions
from batchnorm.ops.schemas import Attributes, Batch, Kept, Running, Vectors, grouped


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which x's statistics are accumulated and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype for arithmetic on [C] vectors: float64 if the device supports it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _spread(t: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """Reshape `[C]`, or the rows of `[K, C]` that `index [N]` selects, to broadcast against `x [N, C, *S]`."""
    if t.dim() == 2 and index is not None:
        t = t[index]
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def _spread_weights(weights: Tensor, x: Tensor) -> Tensor:
    """Return `weights [N, *S]` as `[N, 1, *S]` in the statistics' dtype."""
    return weights.to(statistics_dtype(x)).unsqueeze(1)


def _sum(t: Tensor, index: Tensor | None, groups: int) -> Tensor:
    """Sum `t [N, C, *S]` per channel: `[C]`, or `[groups, C]` by `index`."""
    per_sample = sum_positions(t)
    if index is None:
        return sum_pairwise(per_sample, 0)
    wide = per_sample.to(wide_dtype(t))  # index_add sums one by one, so its error would grow with N
    return wide.new_zeros(groups, t.shape[1]).index_add(0, index, wide).to(per_sample.dtype)


def _first_values(x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """Return one counted value per channel and group, as the origin of deviations.

    A constant channel then deviates by exactly zero, and its output is exactly β.
    """
    n = x.shape[0]
    if index is None and weights is None:
        return x.reshape(*x.shape[:2], -1)[0, :, 0]
    positions = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # [N, C, S]
    size = positions.shape[2]
    place = torch.arange(n * size, device=x.device)
    if weights is not None:
        place = torch.where(weights.flatten() != 0, place, n * size)
    group = torch.zeros_like(place) if index is None else index.repeat_interleave(size)
    first = torch.full((groups,), n * size, device=x.device).scatter_reduce(0, group, place, "amin")
    counted = (first < n * size).unsqueeze(1)
    first = first.clamp(max=n * size - 1)
    values = torch.where(counted, positions[first // size, :, first % size], 0.0)
    return values if index is not None else values[0]


def values_per_channel(x: Tensor) -> int:
    """Return m: the product of all sizes of x except the number of channels."""
    return math.prod((x.shape[0], *x.shape[2:]))


def count_values(x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """Count the values (or sum their weights) per channel: a scalar, or `[groups]` by `index`."""
    if weights is None:
        per_sample = x.new_full((x.shape[0],), math.prod(x.shape[2:]), dtype=wide_dtype(x))
    else:
        per_sample = weights.to(wide_dtype(x)).reshape(x.shape[0], math.prod(x.shape[2:])).sum(1)
    return per_sample.sum() if index is None else per_sample.new_zeros(groups).index_add(0, index, per_sample)


def positive(count: Tensor) -> Tensor:
    """Return the count as a divisor: 1 where it is 0."""
    return torch.where(count > 0, count, 1.0)


def _deviations(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int, divisor: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean, mean_low, sum of squared deviations, and their unit, each `[C]` or `[groups, C]`.

    The sum is in squares of the unit, so that it does not overflow.
    """
    dtype = statistics_dtype(x)
    values = x.to(dtype)
    w = None if weights is None else _spread_weights(weights, x)
    if w is not None:  # values with weight 0 may be NaN
        values = torch.where(w != 0, values, 0.0)

    def total(t: Tensor) -> Tensor:
        return _sum(t if w is None else t * w, index, groups)

    held = values.detach()
    pivot = _first_values(held, index, weights, groups)
    offset = held - _spread(pivot, x, index)
    unit = torch.ones_like(pivot)
    if index is None and weights is None:  # sums of large values could overflow
        limit, large = (2.0**400, 2.0**600) if dtype == torch.float64 else (2.0**50, 2.0**100)
        unit = torch.where(offset.abs().amax((0, *range(2, x.dim()))) > limit, large, unit)
    units = _spread(unit, x, index)
    mean = pivot + (total(offset / units) / divisor).to(dtype) * unit
    mean = mean.to(x.dtype).to(dtype)
    deviation = (values - _spread(mean, x, index)) / units
    low = (total(deviation) / divisor).to(dtype)
    return mean, low * unit, total((deviation - _spread(low, x, index)).square()), unit


def moments(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, mean (as a pair) and sum of squared deviations. Section "Merging moments".

    mean is a constant for differentiation; the derivative of the mean is that of mean_low.
    """
    count = count_values(x, index, weights, groups)
    if x.numel() == 0:
        shape = (x.shape[1],) if index is None else (groups, x.shape[1])
        mean, mean_low, m2 = (x.new_zeros(shape, dtype=statistics_dtype(x)) for _ in range(3))
        return count, mean, mean_low, m2
    divisor = positive(count).unsqueeze(-1)
    mean, mean_low, m2, unit = _deviations(x, index, weights, groups, divisor)
    return count, mean, mean_low, m2 * unit * unit


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean (as a pair) and biased variance of the whole batch, each `[C]`; zeros for an empty batch."""
    if x.numel() == 0:
        mean, mean_low, var = (x.new_zeros(x.shape[1], dtype=statistics_dtype(x)) for _ in range(3))
        return mean, mean_low, var
    m = values_per_channel(x)
    mean, mean_low, m2, unit = _deviations(x, None, None, 1, m)
    return mean, mean_low, m2 / m * unit * unit


def moments_backward(
    x: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    count: Tensor,
    mean: Tensor,
    mean_low: Tensor,
    dmean: Tensor | None,
    dm2: Tensor | None,
) -> Tensor:
    """Return dx of `moments`: `w·(dmean/count + 2·dm2·(x - mean))`."""
    dx = torch.zeros_like(x, dtype=statistics_dtype(x))
    if dmean is not None:
        per_value = dmean / positive(count).unsqueeze(-1)
        dx = dx + _spread(per_value.to(dx.dtype), x, index)
    if dm2 is not None:
        dx = dx + 2.0 * _spread(dm2, x, index) * _deviation(x, mean, mean_low, index)
    if weights is not None:
        w = _spread_weights(weights, x)
        dx = torch.where(w != 0, dx * w, 0.0)
    return dx.to(x.dtype)


def _deviation(x: Tensor, mean: Tensor, mean_low: Tensor | None, index: Tensor | None) -> Tensor:
    """Return `(x - mean) - mean_low`, in the statistics' dtype."""
    deviation = x.to(statistics_dtype(x)) - _spread(mean, x, index)
    return deviation if mean_low is None else deviation - _spread(mean_low, x, index)


def _invstd(x: Tensor, var: Tensor, eps: float) -> Tensor:
    return (var.to(wide_dtype(x)) + eps).rsqrt()


def _scale(x: Tensor, var: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> Tensor:
    """Return γ·invstd, rounded once, in a shape that broadcasts against x."""
    scale = _spread(_invstd(x, var, eps), x, index)
    if weight is not None:
        scale = scale * _spread(weight, x, index)
    return scale.to(statistics_dtype(x))


@grouped
def normalize(
    x: Tensor, vectors: Vectors, residual: Tensor | None, index: Tensor | None, attributes: Attributes
) -> Tensor:
    """Return `f(((x - mean) - mean_low)·γ·invstd + β + residual)` in x's dtype. Section "Forward"."""
    z = preactivation(x, vectors, residual, index, attributes.eps)
    return ACTIVATIONS[attributes.activation].forward(z, attributes.negative_slope).to(x.dtype)


def preactivation(x: Tensor, vectors: Vectors, residual: Tensor | None, index: Tensor | None, eps: float) -> Tensor:
    """Return z, the activation's argument. Backward calls the same function, so that both get the same bits."""
    mean, mean_low, var, weight, bias = vectors
    z = _deviation(x, mean, mean_low, index) * _scale(x, var, weight, eps, index)
    if bias is not None:
        z = z + _spread(bias.to(z.dtype), x, index)
    return z if residual is None else z + residual.to(z.dtype)


@grouped
def train_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, attributes: Attributes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, normalized by the batch's statistics, and mean, mean_low and biased var. Section "Forward"."""
    statistics = batch_statistics(x)
    return normalize(x, *statistics, weight, bias, residual, None, *attributes), *statistics


def _dz(dy: Tensor, kept: Kept, index: Tensor | None, attributes: Attributes) -> Tensor:
    """Return `dy·f'(z)`, from y if it was kept, else from a recomputed z."""
    dtype = statistics_dtype(kept.x)
    eps, activation, negative_slope = attributes
    if activation == "none":
        return dy.to(dtype)
    t = preactivation(kept.x, kept.vectors, kept.residual, index, eps) if kept.y is None else kept.y.to(dtype)
    return ACTIVATIONS[activation].backward(dy.to(dtype), t, negative_slope)


def _returned_dz(dz: Tensor, dy: Tensor, x: Tensor, need_dz: bool) -> Tensor:
    if not need_dz:
        return x.new_empty(0)
    return dz.clone() if dz is dy else dz.to(x.dtype)  # an operator must not return its argument


def _sums(dz: Tensor, kept: Kept, index: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return `Σ dz` and `Σ dz·x̂`."""
    x, vectors = kept.x, kept.vectors
    invstd = _spread(_invstd(x, vectors.var, eps).to(dz.dtype), x, index)
    x_hat = _deviation(x, vectors.mean, vectors.mean_low, index) * invstd
    return _sum(dz, index, groups), _sum(dz * x_hat, index, groups)


def _dx(
    dz: Tensor,
    kept: Kept,
    means: tuple[Tensor, Tensor] | None,
    index: Tensor | None,
    weights: Tensor | None,
    eps: float,
) -> Tensor:
    """Return dx from dz and the means of dx̂ and dx̂·x̂; without means, the statistics are constants."""
    x, (mean, mean_low, var, weight, _) = kept.x, kept.vectors
    dx = dz * _scale(x, var, weight, eps, index)
    if means is not None:
        invstd = _invstd(x, var, eps)
        constant = _spread((invstd * means[0]).to(dz.dtype), x, index)
        slope = _spread((invstd.square() * means[1]).to(dz.dtype), x, index)
        through_statistics = constant + _deviation(x, mean, mean_low, index) * slope
        if weights is not None:
            through_statistics = through_statistics * _spread_weights(weights, x)
        dx = dx - through_statistics
    return dx.to(x.dtype)


@grouped
def backward_reduce(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes
) -> tuple[Tensor, Tensor]:
    """Return `Σ dz` and `Σ dz·x̂` per channel (and group), which are dβ and dγ. Section "Backward"."""
    return _sums(_dz(dy, kept, index, attributes), kept, index, groups, attributes.eps)


@grouped
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
    """Return `dx = invstd·(γ·dz - w·(mean_dxhat + x̂·mean_dxhat_xhat))`, and dz if `need_dz`. Section "Backward"."""
    dz = _dz(dy, kept, index, attributes)
    means = None if mean_dxhat is None or mean_dxhat_xhat is None else (mean_dxhat, mean_dxhat_xhat)
    return _dx(dz, kept, means, index, weights, attributes.eps), _returned_dz(dz, dy, kept.x, need_dz)


@grouped
def train_backward(
    dy: Tensor, kept: Kept, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `train_forward`: dx, dγ, dβ, and dz (which is dr) if `need_dz`. Section "Backward"."""
    dz = _dz(dy, kept, None, attributes)
    dbias, dweight = _sums(dz, kept, None, 1, attributes.eps)
    m = max(values_per_channel(kept.x), 1)
    gamma = 1.0 if kept.weight is None else kept.weight.to(dz.dtype)
    dx = _dx(dz, kept, (gamma * dbias / m, gamma * dweight / m), None, None, attributes.eps)
    return dx, dweight, dbias, _returned_dz(dz, dy, kept.x, need_dz)


@grouped
def normalize_backward(
    dy: Tensor, kept: Kept, index: Tensor | None, groups: int, attributes: Attributes, need_dz: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `normalize` with constant statistics: dx, `Σ dz·x̂`, `Σ dz`, and dz if `need_dz`."""
    dz = _dz(dy, kept, index, attributes)
    sum_dz, sum_dz_xhat = _sums(dz, kept, index, groups, attributes.eps)
    dx = _dx(dz, kept, None, index, None, attributes.eps)
    return dx, sum_dz_xhat, sum_dz, _returned_dz(dz, dy, kept.x, need_dz)


@grouped
def update_running_(running: Running, batch: Batch, momentum: float | None, skip_nonfinite: bool) -> None:
    """Update the running statistics by one batch's. Section "Running statistics".

    There is no update in a backward pass (where activation checkpointing repeats forward), for a batch without values,
    or, with `skip_nonfinite`, for a batch whose statistics are not finite. A single value updates the mean only,
    because its unbiased variance is undefined.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    mean, mean_low, var, m, count = batch
    wide = wide_dtype(mean)
    n = mean.new_full((), m, dtype=wide) if count is None else count.to(wide)
    new = (mean.to(wide) + mean_low.to(wide), var.to(wide) * (n / positive(n - 1.0)))
    checked = (mean, mean_low, var) if skip_nonfinite else ()
    update_toward_(new, running[:2], running.num_batches_tracked, n, checked, momentum)


def update_toward_(
    batch: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor],
    num_batches_tracked: Tensor | None,
    n: Tensor,
    checked: tuple[Tensor, ...],
    momentum: float | None,
) -> None:
    """Update running statistics by those of a batch: the first of each pair if n > 0, the second if n > 1.

    There is no update if one of the `checked` tensors is not finite.
    """
    updates = n > 0
    for statistic in checked:
        updates = updates & statistic.isfinite().all()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(updates)
    wide = wide_dtype(n)
    rate: Tensor | float
    if momentum is not None:
        rate = momentum
    elif num_batches_tracked is not None:
        rate = 1.0 / num_batches_tracked.clamp_min(1).to(wide)
    else:
        raise RuntimeError(_checks.missing_counter("batchnorm::update_running_"))
    for average, new, condition in zip(running, batch, (updates, updates & (n > 1)), strict=True):
        old = average.to(wide)
        average.copy_(torch.where(condition, old * (1.0 - rate) + new.to(wide) * rate, old))


def copy_running(running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies in the statistics' dtype, because running statistics may change before backward."""
    kept = torch.contiguous_format
    mean, var = (t.to(statistics_dtype(t), copy=True, memory_format=kept) for t in (running_mean, running_var))
    return mean, var
