"""The contract of the operators: their schemas, and the arguments that go together.

| name                | result                                                                                |
|---------------------|---------------------------------------------------------------------------------------|
| `train_forward`     | y and the batch's mean (as a pair) and biased variance, in one fused operator         |
| `train_backward`    | dx, dγ, dβ, and dz if a residual needs it                                             |
| `moments`           | count, mean (as a pair), sum of squared deviations                                    |
| `normalize`         | y from given statistics                                                               |
| `normalize_backward`| dx, Σ dz·x̂ and Σ dz with constant statistics, and dz                                  |
| `backward_reduce`   | Σ dz, Σ dz·x̂: the first half of backward, before a collective                         |
| `backward_apply`    | dx from the means of dx̂ and dx̂·x̂: the second half of backward                         |
| `update_running_`   | updates the running statistics; the only one of these that changes its arguments      |
| `copy_running`      | copies of the running statistics that a compiler keeps for backward                   |

Shapes: x, dy, y, residual, dz `[N, C, *S]`; statistics and affine `[C]`, or `[K, C]` with `index [N]` (int64), which
gives each sample's row; sums `[C]`, or `[groups, C]` with `index`; `weights [N, *S]`. The statistics of half and
float32 x are float32. y, dx and dz have the strides of `torch.empty_like(x)`; dz is empty unless `need_dz`. Backward
gets `residual` or `y` if f′(z) depends on it. If it gets neither, it recomputes z from x.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

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


class Signature(NamedTuple):
    """The names of an operator's arguments and results, in order."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]


def _names(declarations: str) -> tuple[str, ...]:
    return tuple(declaration.split()[-1] for declaration in declarations.strip("()").split(", ") if declaration)


SIGNATURES = {name: Signature(*map(_names, schema.split(" -> "))) for name, schema in SCHEMAS.items()}


class Vectors(NamedTuple):
    """The vectors `[C]` or `[K, C]` in `z = ((x - mean) - mean_low)·weight/√(var + eps) + bias`."""

    mean: Tensor
    mean_low: Tensor | None
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Kept(NamedTuple):
    """The tensors that forward keeps for backward."""

    x: Tensor
    residual: Tensor | None
    y: Tensor | None
    mean: Tensor
    mean_low: Tensor | None
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @property
    def vectors(self) -> Vectors:
        """The vectors that normalized x."""
        return Vectors(*self[3:])


class Running(NamedTuple):
    """The buffers that training updates; mean and var are `[C]`, num_batches_tracked is an int64 scalar."""

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None


class Batch(NamedTuple):
    """A batch's statistics `[C]` and its number of values per channel.

    `count` replaces `m` if the number is a tensor (with masks or other processes); it may be fractional.
    """

    mean: Tensor
    mean_low: Tensor
    var: Tensor
    m: int
    count: Tensor | None  # type: ignore[assignment]  # a tuple's method of this name is not needed


class Attributes(NamedTuple):
    """The arguments that are not tensors. negative_slope is the activation's parameter: for elu, it is α."""

    eps: float
    activation: str
    negative_slope: float


_Result = TypeVar("_Result")


def grouped(implementation: Callable[..., _Result]) -> Callable[..., _Result]:
    """Make an implementation callable with the flat arguments of its schema.

    Each parameter annotated as one of the tuples above receives as many arguments as it has fields.
    """
    kinds: list[Any] = []
    at = 0
    for name, kind in typing.get_type_hints(implementation).items():
        if name != "return":
            width = len(getattr(kind, "_fields", (name,)))
            kinds.append((slice(at, at + width), kind) if width > 1 else at)
            at += width

    @functools.wraps(implementation)
    def operator(*flat: object) -> _Result:
        new = tuple.__new__  # creates a NamedTuple in half the time of calling it
        return implementation(*[flat[k] if k.__class__ is int else new(k[1], flat[k[0]]) for k in kinds])

    return operator
