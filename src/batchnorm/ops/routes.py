"""Choose how the derivative of a call is computed. This is the only place that does.

No single registration covers every case. With a registered formula, `torch.func.grad` raises an error and forward-mode
tangents are dropped silently. A Function with a forward-mode rule does not compile, and `torch.jit.trace` cannot record
one. Therefore, compiled code uses the registered operator, `torch.func`, forward mode and traces use plain torch
operations, and everything else uses an `autograd.Function` that calls the operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm import _checks
from batchnorm.distributed import Peers
from batchnorm.ops import direct, eager, strict
from batchnorm.ops.derivatives import (
    NormalizeFunction,
    TrainFunction,
    below_autograd,
    named,
    needs_gradient,
    normalize,
    train_forward,
)
from batchnorm.ops.parts import (
    BatchStatistics,
    FiniteFunction,
    PartsFunction,
    at_once,
    finite,
    statistics_by_parts,
)
from batchnorm.ops.schemas import Attributes

_ops = torch.ops.batchnorm

# These skip the functorch handling in Function.apply, which takes a tenth of a tiny layer's time and is unused here.
_apply_train = super(torch.autograd.Function, TrainFunction).apply
_apply_normalize = super(torch.autograd.Function, NormalizeFunction).apply
_apply_parts = super(torch.autograd.Function, PartsFunction).apply


def _transforms_active() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain() -> bool:
    """Return whether to use plain torch operations: for transforms, and in a trace, which cannot contain a Function."""
    return _transforms_active() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def batch_statistics_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and the batch's mean, mean_low and biased variance (these without gradient)."""
    attributes = named(Attributes, (eps, activation, negative_slope))
    if _transforms_active():
        y, *found = eager.train_forward(x, weight, bias, residual, *attributes)
        mean, mean_low, var = (t.detach() for t in found)
        return y, mean, mean_low, var
    if torch.compiler.is_compiling():
        return _ops.train_forward(x, weight, bias, residual, *attributes)
    if not needs_gradient(x, weight, bias, residual):
        with below_autograd():
            return train_forward(x, weight, bias, residual, *attributes)
    statistics: list[Tensor] = []
    y = _apply_train(x, weight, bias, residual, attributes, statistics, None)
    return y, *statistics


def batch_statistics_norm_and_update_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    running: tuple[Tensor, Tensor, Tensor | None],
    momentum: float | None,
    skip_nonfinite: bool,
) -> Tensor:
    """Return y, and update the running statistics (mean, variance and count) by those of the batch."""
    differentiable = needs_gradient(x, weight, bias, residual)
    together = not (momentum is None or skip_nonfinite or torch.compiler.is_compiling() or is_plain())
    together = together and direct.is_direct(x, weight, bias, residual, *running)
    if not together or (differentiable and not strict.can_be_saved(x, weight, bias, residual)):
        y, *found = batch_statistics_norm(x, weight, bias, residual, eps, activation, negative_slope)
        update_running_(*running, *found, eager.values_per_channel(x), None, momentum, skip_nonfinite)
        return y
    attributes = named(Attributes, (eps, activation, negative_slope))
    if differentiable:
        return _apply_train(x, weight, bias, residual, attributes, [], (*running, momentum))
    return direct.train_forward_and_update_(x, weight, bias, residual, *attributes, *running, momentum)[0]


def fixed_statistics_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    index: Tensor | None = None,
) -> Tensor:
    """Return y from running statistics, which receive no gradient and may change before backward.

    Statistics, weight and bias are `[C]`, or `[K, C]` with `index`.
    """
    attributes = named(Attributes, (eps, activation, negative_slope))
    differentiable, compiling = needs_gradient(x, weight, bias, residual), torch.compiler.is_compiling()
    mean, var = mean.detach(), var.detach()
    if index is not None and (torch.compiler.is_exporting() or torch.jit.is_tracing()):  # type: ignore[attr-defined]
        return eager.normalize(x, mean, None, var, weight, bias, residual, index, *attributes)  # needs only torch
    dtype = eager.statistics_dtype(x)
    if _transforms_active():
        mean, var = eager.copy_running(mean, var)
    elif differentiable or not mean.dtype == var.dtype == dtype:
        # A compiler's backward would recompute a plain clone, from changed buffers.
        mean, var = _ops.copy_running.default(mean, var)
    if differentiable and not compiling and not _transforms_active():
        return _apply_normalize(x, weight, bias, residual, mean, var, index, attributes)
    return _normalize(x, mean, None, var, weight, bias, residual, index, *attributes)


def _normalize(*arguments: Any) -> Tensor:
    """Return y of the operator `normalize` without an `autograd.Function`."""
    if is_plain():
        return eager.normalize(*arguments)
    if torch.compiler.is_compiling():
        return _ops.normalize(*arguments)
    with below_autograd():
        return normalize(*arguments)


def batch_moments(
    x: Tensor,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    groups: int = 1,
    peers: Peers | None = None,
) -> BatchStatistics:
    """Return the statistics of x (by index, weighted, over several processes) for `batch_statistics_norm_by_parts`.

    Only that function handles their gradient. For any other computation, detach them.
    """
    if is_plain():
        return statistics_by_parts(x, index, weights, groups, peers, eager.moments)
    if torch.compiler.is_compiling():
        return statistics_by_parts(x, index, weights, groups, peers, _ops.moments)
    with torch.no_grad(), below_autograd():
        return statistics_by_parts(x, index, weights, groups, peers, _ops.moments.default)


def running_where_single(statistics: BatchStatistics, running_mean: Tensor, running_var: Tensor) -> BatchStatistics:
    """Replace the statistics of each group with at most one value by running statistics, `[C]` or `[K, C]`.

    The group's counts become 0, so that it has no gradient through its statistics and updates no running statistics.
    """
    count, mean, mean_low, var, effective_count = statistics
    _checks.check_allocated("on_single='running'", running_mean=running_mean, running_var=running_var)
    held_mean, held_var = running_mean.detach(), running_var.detach()
    if not _transforms_active():  # as in `fixed_statistics_norm`
        held_mean, held_var = _ops.copy_running.default(held_mean, held_var)
    single = effective_count <= 1
    rows = single.unsqueeze(-1)
    return BatchStatistics(
        torch.where(single, 0.0, count),
        torch.where(rows, held_mean.to(mean.dtype), mean),
        torch.where(rows, 0.0, mean_low),
        torch.where(rows, held_var.to(var.dtype), var),
        torch.where(single, 0.0, effective_count),
    )


def batch_statistics_norm_by_parts(
    x: Tensor,
    statistics: BatchStatistics,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str = "none",
    negative_slope: float = 0.0,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    groups: int = 1,
    peers: Peers | None = None,
) -> Tensor:
    """Return y from the statistics that `batch_moments` returned for the same index, weights, groups and peers.

    weight and bias are `[C]`, or `[groups, C]` with `index`. If the statistics were computed without an index, an index
    here selects only rows of weight and bias. The gradient of x includes the path through its statistics,
    except for those with count 0.
    """
    attributes = named(Attributes, (eps, activation, negative_slope))
    _, mean, mean_low, var, _ = statistics
    plain = torch.compiler.is_compiling() or is_plain()
    if weights is not None and not _is_known_finite(x):
        x = finite(x) if plain else FiniteFunction.apply(x)
    if not plain and needs_gradient(x, weight, bias, residual):
        shared = mean.dim() == 1
        return _apply_parts(x, weight, bias, residual, [statistics], shared, index, weights, groups, peers, attributes)
    return _normalize(x, mean, mean_low, var, weight, bias, residual, index, *attributes)


def batch_statistics_norm_and_moments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str = "none",
    negative_slope: float = 0.0,
    index: Tensor | None = None,
    weights: Tensor | None = None,
    groups: int = 1,
    shared: bool = False,
    where_single: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, BatchStatistics]:
    """Return y and the statistics of `batch_moments` and `batch_statistics_norm_by_parts`, at once if possible.

    With `shared`, all samples share statistics, and the index selects only rows of weight and bias. `where_single` are
    the running statistics for `running_where_single`.
    """
    attributes, tensors = named(Attributes, (eps, activation, negative_slope)), (weight, bias, residual)
    found = _at_once(x, tensors, shared, index, weights, groups, attributes)
    if found is not None and (where_single is None or not bool((found[1].effective_count <= 1).any())):
        return found
    statistics = batch_moments(x, None if shared else index, weights, 1 if shared else groups)
    if where_single is not None:
        statistics = running_where_single(statistics, *where_single)
    y = batch_statistics_norm_by_parts(x, statistics, *tensors, *attributes, index, weights, groups)
    return y, statistics


def _at_once(
    x: Tensor,
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None],
    shared: bool,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    attributes: Attributes,
) -> tuple[Tensor, BatchStatistics] | None:
    """Return the result of `at_once`, or None if the ordinary route must compute it."""
    if (index is None and weights is None) or not strict.takes_parts(x, *tensors, index, weights):
        return None
    try:
        if not needs_gradient(x, *tensors):
            return at_once(x, *tensors, shared, index, weights, groups, attributes)
        if not strict.can_be_saved(x, *tensors, index, weights):
            return None
        found: list[BatchStatistics] = []
        y = _apply_parts(x, *tensors, found, shared, index, weights, groups, None, attributes)
    except strict.RefusedError:
        return None
    return y, found[0]


def _is_known_finite(x: Tensor) -> bool:
    """Return whether x is known to be finite, from its sum, which takes a third of the time of a copy without NaN.

    The sum of finite values may overflow. The copy then equals x.
    """
    return _checks.can_be_read(x) and bool(x.detach().sum().isfinite())


def update_running_(*arguments: Any) -> None:
    """Update the running statistics once; `ops.eager.update_running_` documents the operator's arguments."""
    update_once(_ops.update_running_, eager.update_running_, arguments)


def update_running_by_parts_(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    statistics: BatchStatistics,
    momentum: float | None,
    skip_nonfinite: bool,
) -> bool:
    """Update running statistics by those of groups, or return False without any effect.

    Running statistics `[K, C]` have a row for each group. If they are `[C]`, the mean moves toward the mean of all
    values, and the variance toward the pooled variance of the groups.
    """
    tensors = (running_mean, running_var, num_batches_tracked, *statistics)
    if not strict.takes_parts(*tensors):
        return False
    try:
        strict.update_parts_(*tensors, momentum, skip_nonfinite)
    except RuntimeError:
        return False
    return True


def update_once(operator: Callable[..., None], plain: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Update running statistics by the operator; in a trace and under `torch.func`, by plain torch operations.

    Raises:
        RuntimeError: under `torch.func`, the running statistics are captured instead of passed as arguments.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # so that the trace loads without this library
        plain(*arguments)
        return
    if not torch._C._are_functorch_transforms_active():
        operator(*arguments)
        return
    try:
        plain(*arguments)
    except RuntimeError as error:
        raise RuntimeError(_checks.CAPTURED_STATISTICS) from error
