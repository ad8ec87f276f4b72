"""The operators in plain torch operations: for every device and layout, without a compiler.

Each function is also the composition that other derivatives go through (`torch.func`, forward mode, second
derivatives): all are differentiable in their tensor arguments. Equations are named as in the mathematics page.

Statistics of half and float32 x are float32, of float64 x float64. The mean is a pair, `mean + mean_low`:
`mean` is rounded to x's dtype so that `x - mean` is exact near it, `mean_low` is what the rounding lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from batchnorm.ops.activations import ACTIVATIONS
from batchnorm.ops.reduce import fold, sum_positions


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x's statistics are accumulated and returned."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic on [C] vectors: float64 where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def _spread(t: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """`[C]`, or `[K, C]` picked by `index [N]`, shaped to broadcast against `x [N, C, *S]`."""
    if t.dim() == 2 and index is not None:
        t = t[index]
    return t.reshape(*t.shape, *(1,) * (x.dim() - 2))


def _spread_weights(weights: Tensor, x: Tensor) -> Tensor:
    """`weights [N, *S]` as `[N, 1, *S]` in the statistics' dtype."""
    return weights.to(statistics_dtype(x)).unsqueeze(1)


def _sum(t: Tensor, index: Tensor | None, groups: int) -> Tensor:
    """Sum `t [N, C, *S]` per channel: `[C]`, or `[groups, C]` by `index`."""
    per_sample = sum_positions(t)
    if index is None:
        return fold(per_sample, 0)
    wide = per_sample.to(wide_dtype(t))  # index_add has no blocks: its error would grow with N
    return wide.new_zeros(groups, t.shape[1]).index_add(0, index, wide).to(per_sample.dtype)


def _first_values(x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """One counted value per channel and group, from which deviations are measured.

    With it a constant channel deviates by exactly zero, so that it normalizes to exactly β.
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
    """m: every size of x but the channels', multiplied."""
    return math.prod((x.shape[0], *x.shape[2:]))


def count_values(x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int) -> Tensor:
    """Values (or their weights) per channel: a scalar, or `[groups]` by `index`."""
    if weights is None:
        per_sample = x.new_full((x.shape[0],), math.prod(x.shape[2:]), dtype=wide_dtype(x))
    else:
        per_sample = weights.to(wide_dtype(x)).reshape(x.shape[0], math.prod(x.shape[2:])).sum(1)
    return per_sample.sum() if index is None else per_sample.new_zeros(groups).index_add(0, index, per_sample)


def positive(count: Tensor) -> Tensor:
    """A divisor that leaves sums as they are where nothing was counted."""
    return torch.where(count > 0, count, 1.0)


def _deviations(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int, divisor: Tensor | int
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, mean_low and the sum of squared deviations, each `[C]` or `[groups, C]`."""
    dtype = statistics_dtype(x)
    values = x.to(dtype)
    w = None if weights is None else _spread_weights(weights, x)
    if w is not None:  # what does not count may be anything, NaN too
        values = torch.where(w != 0, values, 0.0)

    def total(t: Tensor) -> Tensor:
        return _sum(t if w is None else t * w, index, groups)

    held = values.detach()
    pivot = _first_values(held, index, weights, groups)
    mean = pivot + (total(held - _spread(pivot, x, index)) / divisor).to(dtype)
    mean = mean.to(x.dtype).to(dtype)
    deviation = values - _spread(mean, x, index)
    mean_low = (total(deviation) / divisor).to(dtype)
    deviation = deviation - _spread(mean_low, x, index)
    return mean, mean_low, total(deviation.square())


def moments(
    x: Tensor, index: Tensor | None, weights: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count, mean (as a pair) and sum of squared deviations. Section "Merging moments".

    The derivative runs through mean_low alone; mean is a constant that mean_low completes.
    """
    count = count_values(x, index, weights, groups)
    if x.numel() == 0:
        shape = (x.shape[1],) if index is None else (groups, x.shape[1])
        mean, mean_low, m2 = (x.new_zeros(shape, dtype=statistics_dtype(x)) for _ in range(3))
        return count, mean, mean_low, m2
    divisor = positive(count).unsqueeze(-1)
    return count, *_deviations(x, index, weights, groups, divisor)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (as a pair) and biased variance of the whole batch, each `[C]`; zeros for an empty one."""
    if x.numel() == 0:
        mean, mean_low, var = (x.new_zeros(x.shape[1], dtype=statistics_dtype(x)) for _ in range(3))
        return mean, mean_low, var
    m = values_per_channel(x)
    mean, mean_low, m2 = _deviations(x, None, None, 1, m)
    return mean, mean_low, m2 / m


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
    """Dx of `moments`: `w·(dmean/count + 2·dm2·(x - mean))`."""
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
    """`(x - mean) - mean_low`, in the statistics' dtype."""
    deviation = x.to(statistics_dtype(x)) - _spread(mean, x, index)
    return deviation if mean_low is None else deviation - _spread(mean_low, x, index)


def _invstd(x: Tensor, var: Tensor, eps: float) -> Tensor:
    return (var.to(wide_dtype(x)) + eps).rsqrt()


def _scale(x: Tensor, var: Tensor, weight: Tensor | None, eps: float, index: Tensor | None) -> Tensor:
    """γ·invstd, shaped to broadcast against x; rounded once."""
    scale = _spread(_invstd(x, var, eps), x, index)
    if weight is not None:
        scale = scale * _spread(weight, x, index)
    return scale.to(statistics_dtype(x))


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
    """`f(((x - mean) - mean_low)·γ·invstd + β + residual)` in x's dtype. Section "Forward"."""
    z = preactivation(x, mean, mean_low, var, weight, bias, residual, index, eps)
    return ACTIVATIONS[activation].forward(z, negative_slope).to(x.dtype)


def preactivation(
    x: Tensor,
    mean: Tensor,
    mean_low: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    index: Tensor | None,
    eps: float,
) -> Tensor:
    """z, the activation's argument. Backward recomputes it by this same function, so that both see one kink."""
    z = _deviation(x, mean, mean_low, index) * _scale(x, var, weight, eps, index)
    if bias is not None:
        z = z + _spread(bias.to(z.dtype), x, index)
    return z if residual is None else z + residual.to(z.dtype)


def train_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize by the batch's own statistics: y, mean, mean_low, biased var. Section "Forward"."""
    mean, mean_low, var = batch_statistics(x)
    y = normalize(x, mean, mean_low, var, weight, bias, residual, None, eps, activation, negative_slope)
    return y, mean, mean_low, var


def _dz(
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
) -> Tensor:
    """`dy·f'(z)`: from y where it was kept, else from z, recomputed."""
    dtype = statistics_dtype(x)
    if activation == "none":
        return dy.to(dtype)
    t = y.to(dtype) if y is not None else preactivation(x, mean, mean_low, var, weight, bias, residual, index, eps)
    return ACTIVATIONS[activation].backward(dy.to(dtype), t, negative_slope)


def _returned_dz(dz: Tensor, dy: Tensor, x: Tensor, need_dz: bool) -> Tensor:
    if not need_dz:
        return x.new_empty(0)
    return dz.clone() if dz is dy else dz.to(x.dtype)  # an operator's result is never its argument


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
    """`Σ dz` and `Σ dz·x̂` per channel (and group): dβ and dγ of those rows. Section "Backward"."""
    dz = _dz(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    invstd = _spread(_invstd(x, var, eps).to(dz.dtype), x, index)
    x_hat = _deviation(x, mean, mean_low, index) * invstd
    return _sum(dz, index, groups), _sum(dz * x_hat, index, groups)


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
    """`dx = invstd·(γ·dz - w·(mean_dxhat + x̂·mean_dxhat_xhat))`, and dz if asked for. Section "Backward"."""
    dz = _dz(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    dx = dz * _scale(x, var, weight, eps, index)
    if mean_dxhat is not None and mean_dxhat_xhat is not None:
        invstd = _invstd(x, var, eps)
        constant = _spread((invstd * mean_dxhat).to(dz.dtype), x, index)
        slope = _spread((invstd.square() * mean_dxhat_xhat).to(dz.dtype), x, index)
        through_statistics = constant + _deviation(x, mean, mean_low, index) * slope
        if weights is not None:
            through_statistics = through_statistics * _spread_weights(weights, x)
        dx = dx - through_statistics
    return dx.to(x.dtype), _returned_dz(dz, dy, x, need_dz)


def train_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    mean: Tensor,
    mean_low: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    need_dz: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `train_forward`: dx, dγ, dβ, and dz (which is dr) if asked for. Section "Backward"."""
    dz = _dz(dy, x, residual, y, mean, mean_low, var, weight, bias, None, eps, activation, negative_slope)
    kept = (x, None, None, mean, mean_low, var, weight, bias)
    dbias, dweight = backward_reduce(dz, *kept, None, 1, eps, "none", 0.0)
    m = max(values_per_channel(x), 1)
    gamma = 1.0 if weight is None else weight.to(dz.dtype)
    means = (gamma * dbias / m, gamma * dweight / m)
    dx, _ = backward_apply(dz, *kept, *means, None, None, eps, "none", 0.0, False)
    return dx, dweight, dbias, _returned_dz(dz, dy, x, need_dz)


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
    """Gradients of `normalize` with its statistics held: dx, `Σ dz·x̂`, `Σ dz`, and dz if asked for."""
    dz = _dz(dy, x, residual, y, mean, mean_low, var, weight, bias, index, eps, activation, negative_slope)
    kept = (x, None, None, mean, mean_low, var, weight, bias)
    sum_dz, sum_dz_xhat = backward_reduce(dz, *kept, index, groups, eps, "none", 0.0)
    dx, _ = backward_apply(dz, *kept, None, None, index, None, eps, "none", 0.0, False)
    return dx, sum_dz_xhat, sum_dz, _returned_dz(dz, dy, x, need_dz)


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
    """Move the running statistics toward one batch's. Section "Running statistics".

    `m` is the number of values per channel; `count` replaces it where that is known as a tensor alone (masks, other
    processes), and may be fractional. Nothing moves inside a backward pass (activation checkpointing runs forward again
    there), nor for a batch without values, nor, with `skip_nonfinite`, for one whose statistics are not finite. A
    single value moves only the mean: its unbiased variance is undefined.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    wide = wide_dtype(mean)
    n = mean.new_full((), m, dtype=wide) if count is None else count.to(wide)
    moves = n > 0
    if skip_nonfinite:
        moves = moves & mean.isfinite().all() & mean_low.isfinite().all() & var.isfinite().all()
    if num_batches_tracked is not None:
        num_batches_tracked.add_(moves)
    rate: Tensor | float
    if momentum is not None:
        rate = momentum
    elif num_batches_tracked is not None:
        rate = 1.0 / num_batches_tracked.clamp_min(1).to(wide)
    else:
        raise RuntimeError("update_running_ expects num_batches_tracked where momentum is None, got None for both.")
    new_mean = mean.to(wide) + mean_low.to(wide)
    new_var = var.to(wide) * (n / positive(n - 1.0))
    for running, new, moving in ((running_mean, new_mean, moves), (running_var, new_var, moves & (n > 1.0))):
        old = running.to(wide)
        running.copy_(torch.where(moving, old * (1.0 - rate) + new * rate, old))


def copy_running(running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """Copies, in the statistics' dtype, of running statistics that may be written to before backward."""
    mean, var = (t.to(statistics_dtype(t), copy=True) for t in (running_mean, running_var))
    return mean, var
