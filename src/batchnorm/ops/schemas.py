"""The operators' schemas, their eager implementation, and their fakes (shapes for compilation and export).

| name                | what                                                                                  |
|---------------------|---------------------------------------------------------------------------------------|
| `train_forward`     | y and the batch's mean (as a pair) and biased variance, in one fused operator         |
| `train_backward`    | dx, dγ, dβ, and dz where a residual wants it                                          |
| `moments`           | count, mean (as a pair), sum of squared deviations                                    |
| `normalize`         | y from given statistics                                                               |
| `normalize_backward`| dx, Σ dz·x̂, Σ dz with the statistics held, and dz                                     |
| `backward_reduce`   | Σ dz, Σ dz·x̂: the half of a backward before a collective                              |
| `backward_apply`    | dx from the means of dx̂ and dx̂·x̂: the half after it                                   |
| `update_running_`   | moves the running statistics; the only operator that changes its arguments            |
| `copy_running`      | copies of the running statistics that a compiler keeps for backward                   |

Shapes: x, dy, y, residual, dz `[N, C, *S]`; statistics and affine `[C]`, or `[K, C]` with `index [N]` (int64) that
names each sample's row; sums `[C]`, or `[groups, C]` with `index`; `weights [N, *S]`. The statistics of half and
float32 x are float32. y, dx and dz have the strides of `torch.empty_like(x)`; dz is empty unless `need_dz`.
Backward takes `residual` or `y` or neither: what tells f′(z), which is recomputed from x where neither is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import eager, triton

_AFFINE = "Tensor? weight, Tensor? bias"
_STATISTICS = "Tensor mean, Tensor? mean_low, Tensor var"
_ACTIVATION = "float eps, str activation, float negative_slope"
_KEPT = f"Tensor dy, Tensor x, Tensor? residual, Tensor? y, {_STATISTICS}, {_AFFINE}"

SCHEMAS = {
    "train_forward": f"(Tensor x, {_AFFINE}, Tensor? residual, {_ACTIVATION}) -> "
    "(Tensor y, Tensor mean, Tensor mean_low, Tensor var)",
    "train_backward": f"({_KEPT}, {_ACTIVATION}, bool need_dz) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dz)",
    "moments": "(Tensor x, Tensor? index, Tensor? weights, SymInt groups) -> "
    "(Tensor count, Tensor mean, Tensor mean_low, Tensor m2)",
    "normalize": f"(Tensor x, {_STATISTICS}, {_AFFINE}, Tensor? residual, Tensor? index, {_ACTIVATION}) -> Tensor y",
    "normalize_backward": f"({_KEPT}, Tensor? index, SymInt groups, {_ACTIVATION}, bool need_dz) -> "
    "(Tensor dx, Tensor sum_dz_xhat, Tensor sum_dz, Tensor dz)",
    "backward_reduce": f"({_KEPT}, Tensor? index, SymInt groups, {_ACTIVATION}) -> (Tensor sum_dz, Tensor sum_dz_xhat)",
    "backward_apply": f"({_KEPT}, Tensor? mean_dxhat, Tensor? mean_dxhat_xhat, Tensor? index, Tensor? weights, "
    f"{_ACTIVATION}, bool need_dz) -> (Tensor dx, Tensor dz)",
    "update_running_": "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor mean, Tensor mean_low, Tensor var, SymInt m, Tensor? count, float? momentum, bool skip_nonfinite) -> ()",
    "copy_running": "(Tensor running_mean, Tensor running_var) -> (Tensor mean, Tensor var)",
}

# Which results have x's strides, by position; the others are vectors.
_LIKE_X = {
    "train_forward": (0,),
    "train_backward": (0, 3),
    "normalize": (0,),
    "normalize_backward": (0, 3),
    "backward_apply": (0, 1),
}

_LIBRARY = torch.library.Library("batchnorm", "DEF")


def _with_strides_of(x: Tensor, value: Tensor) -> Tensor:
    """`value`, in memory as `torch.empty_like(x)`, and never one of the operator's arguments."""
    if value.shape != x.shape:  # a dz that was not asked for
        return value
    out = torch.empty_like(x)
    return value if value.stride() == out.stride() else out.copy_(value)


def _implementation(name: str) -> Callable[..., Any]:
    function = getattr(eager, name)
    places = _LIKE_X.get(name, ())
    if not places:
        return function
    x_at = 0 if name in ("train_forward", "normalize") else 1

    def implementation(*args: Any) -> Any:
        result = function(*args)
        if isinstance(result, Tensor):
            return _with_strides_of(args[x_at], result)
        return tuple(_with_strides_of(args[x_at], r) if i in places else r for i, r in enumerate(result))

    return implementation


for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)
    _LIBRARY.impl(_name, _implementation(_name), "CompositeExplicitAutograd")
for _name in triton.OPERATORS:
    _LIBRARY.impl(_name, triton.implementation(_name, _implementation(_name)), "CUDA")


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"batchnorm::{name}", lib=_LIBRARY)


def _vectors(number: int, x: Tensor, index: Tensor | None = None, groups: int = 1) -> list[Tensor]:
    shape = (x.shape[1],) if index is None else (groups, x.shape[1])
    return [x.new_empty(shape, dtype=eager.statistics_dtype(x)) for _ in range(number)]


def _dz(x: Tensor, need_dz: bool) -> Tensor:
    return torch.empty_like(x) if need_dz else x.new_empty(0)


@_fake("train_forward")
def _(x, weight, bias, residual, eps, activation, negative_slope):
    return torch.empty_like(x), *_vectors(3, x)


@_fake("train_backward")
def _(dy, x, residual, y, mean, mean_low, var, weight, bias, eps, activation, negative_slope, need_dz):
    return torch.empty_like(x), *_vectors(2, x), _dz(x, need_dz)


@_fake("moments")
def _(x, index, weights, groups):
    count = x.new_empty(() if index is None else (groups,), dtype=eager.wide_dtype(x))
    return count, *_vectors(3, x, index, groups)


@_fake("normalize")
def _(x, mean, mean_low, var, weight, bias, residual, index, eps, activation, negative_slope):
    return torch.empty_like(x)


@_fake("normalize_backward")
def _(
    dy,
    x,
    residual,
    y,
    mean,
    mean_low,
    var,
    weight,
    bias,
    index,
    groups,
    eps,
    activation,
    negative_slope,
    need_dz,
):
    return torch.empty_like(x), *_vectors(2, x, index, groups), _dz(x, need_dz)


@_fake("backward_reduce")
def _(dy, x, residual, y, mean, mean_low, var, weight, bias, index, groups, eps, activation, negative_slope):
    return tuple(_vectors(2, x, index, groups))


@_fake("backward_apply")
def _(
    dy, x, residual, y, mean, mean_low, var, weight, bias, mean_dxhat, mean_dxhat_xhat, index, weights, eps,
    activation, negative_slope, need_dz,
):  # fmt: skip
    return torch.empty_like(x), _dz(x, need_dz)


@_fake("update_running_")
def _(running_mean, running_var, num_batches_tracked, mean, mean_low, var, m, count, momentum, skip_nonfinite):
    return None


@_fake("copy_running")
def _(running_mean, running_var):
    return tuple(torch.empty_like(t, dtype=eager.statistics_dtype(t)) for t in (running_mean, running_var))
