"""Small tensors in eager mode: one call per pass, which checks its arguments itself.

For a tensor of 64 × 64 values, Python's checks and the bookkeeping of several operators take longer than the kernels.
The strict operators, which only the compiled part has, do the work of several operators of the contract in one call.
They raise an error for arguments that a layer must not accept, before they change anything. A layer therefore calls
them first. Only after an error does it check its arguments one by one, and take the ordinary route if they are right.
On a GPU, the node in C++ calls functions that start the kernels (`triton/replay.py`) instead of these operators.

They are used for plain tensors if nothing else observes the operators of the contract: no compiler, transform, trace or
dispatch mode. Below, `attributes` are eps, the activation's number in the table of activations, and its parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from batchnorm._checks import CHANNEL_DIMS, LAYOUTS
from batchnorm._options import LEAST_EPS, ON_NONFINITE, ON_SINGLE
from batchnorm.ops import compiled, direct, eager, triton
from batchnorm.ops.activations import ACTIVATIONS, known_from_output
from batchnorm.ops.derivatives import (
    Gradients,
    below_autograd,
    differentiable_gradients,
    kept_for_activation,
    normalize_gradients,
    train_gradients,
)
from batchnorm.ops.schemas import Attributes, Kept

_Numbered = tuple[float, int, float]

AVAILABLE = bool(compiled.cpu_capabilities()) and torch._C._dispatch_has_kernel_for_dispatch_key(
    "batchnorm::strict_train_forward_", "CPU"
)

# The module with the node in C++, or None.
_native = compiled.autograd_module()
if _native is not None:
    _native.set_functions(triton.start, triton.start_again)

_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")
_NAMES = tuple(ACTIVATIONS)
_NUMBERS = {name: number for number, name in enumerate(_NAMES)}
_NONE = _NUMBERS["none"]
# The place of each activation's parameter in (none, negative_slope, alpha).
_PARAMETERS = [(None, "negative_slope", "alpha").index(row.parameter) for row in ACTIVATIONS.values()]
_ON_NONFINITE = ("propagate", "skip")  # for "error", batch_norm must see the statistics


class _Ranks(dict[str, tuple[int, ...] | None]):
    """The ranks of x that a layer accepts, by its name; None for every rank from 2 on."""

    def __missing__(self, caller: str) -> tuple[int, ...] | None:
        ranks, _ = LAYOUTS.get(caller[-2:], (None, ""))
        self[caller] = ranks
        return ranks


_RANKS = _Ranks()


def _operator(name: str) -> Callable[..., Any]:
    if not AVAILABLE or not hasattr(torch.ops.batchnorm, name):  # a library of older sources may lack some
        return _unavailable
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # has no derivative
    # torch.ops would search the arguments for __torch_function__ again.
    return partial(torch._C._dispatch_call_boxed, torch._C._dispatch_find_schema_or_throw(f"batchnorm::{name}", ""))


def _unavailable(*arguments: Any) -> Any:
    raise RuntimeError


_train_forward = _operator("strict_train_forward_")
_train_backward = _operator("strict_train_backward")
_normalize = _operator("strict_normalize")
parts_forward = _operator("strict_parts_forward")
parts_backward = _operator("strict_parts_backward")
update_parts_ = _operator("strict_update_parts_")

_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_tracing = torch._C._is_tracing
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd.grad(..., is_grads_batched=True)


def takes_parts(*tensors: Tensor | None) -> bool:
    """Return whether the operators for parts may be called with these tensors, of which the first exists."""
    first = tensors[0]
    assert first is not None
    return (
        not torch.compiler.is_compiling()
        and parts_forward is not _unavailable
        and first.is_cpu
        and direct.unobserved(tensors)
        and not _is_tracing()
        and not _is_batched(first)
        and forward_ad._current_level < 0
    )


def can_be_saved(*tensors: Tensor | None) -> bool:
    """Return whether autograd can save these tensors, which it checks only after a forward that updates statistics."""
    for t in tensors:  # noqa: SIM110  (a generator takes four times as long)
        if t is not None and t.is_inference():
            return False
    return True


class RefusedError(Exception):
    """The operator refused its arguments. An error of a hook on saved tensors must not be mistaken for it."""


class StrictTrainFunction(torch.autograd.Function):
    """y of a training step under autograd, with the update of the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        """Compute y, and save tensors for backward. `options` are the operator's arguments after the residual."""
        y: Tensor
        try:
            y, statistics = _train_forward(x, weight, bias, residual, *options)
        except RuntimeError as error:
            raise RefusedError from error
        attributes = options[3:6]
        if residual is None:
            ctx.save_for_backward(x, statistics, weight, bias)
        else:
            others = kept_for_activation(residual, y, named(attributes))
            ctx.save_for_backward(x, statistics, weight, bias, *others)
        ctx.attributes = attributes
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Compute the first derivative by one operator, higher ones through plain torch operations."""
        if dy is None:
            return (None,) * 5
        saved, needs, attributes = ctx.saved_tensors, ctx.needs_input_grad, ctx.attributes
        if len(saved) == 4:
            x, statistics, weight, bias = saved
            residual = y = None
        else:
            x, statistics, weight, bias, residual, y = saved
        ordinary = needs[0] and not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or _dispatch_modes()
            or _transforms_active()
            or _is_batched(dy)
        )
        if ordinary:
            _, activation, _ = attributes
            need_dz = needs[3] and activation != _NONE
            dx, dweight, dbias, dz = _train_backward(dy, x, residual, y, statistics, weight, bias, *attributes, need_dz)
            if needs[3] and not need_dz:
                dz = dy
            return dx, dweight if needs[1] else None, dbias if needs[2] else None, dz, None
        mean, mean_low, var = statistics.unbind()
        kept = Kept(x, residual, y, mean, mean_low, var, weight, bias)
        return *_gradients(dy, kept, needs[:4], named(attributes)), None


def named(attributes: _Numbered) -> Attributes:
    """Return attributes with the activation's name instead of its number."""
    eps, number, parameter = attributes
    return Attributes(eps, _NAMES[number], parameter)


def _gradients(dy: Tensor, kept: Kept, needs: tuple[bool, ...], attributes: Attributes) -> Gradients:
    """Return the gradients by the operators of the contract, or as differentiable functions.

    Statistics without `mean_low` are running statistics, which are constants.
    """
    of_batch = kept.mean_low is not None
    if torch.is_grad_enabled():
        statistics = eager.batch_statistics if of_batch else None
        return differentiable_gradients(dy, kept, needs, attributes, statistics)
    with below_autograd():
        if of_batch:
            return train_gradients(dy, kept, needs, attributes)
        gradients, _, _ = normalize_gradients(dy, kept, None, needs, attributes)
        return gradients


def _operator_gradients(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    y: Tensor | None,
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    number: int,
    parameter: float,
    needs: list[bool],
) -> Gradients:
    """Compute gradients for the node in C++ if a mode or transform is active, or if they must be differentiable."""
    mean, *low, var = statistics.unbind()
    kept = Kept(x, residual, y, mean, low[0] if low else None, var, weight, bias)
    return _gradients(dy, kept, tuple(needs), named((eps, number, parameter)))


def define_gradients(arguments: str, implementation: Callable[..., Gradients]) -> None:
    """Define the operator with this signature, which the node in C++ calls for gradients."""
    _LIBRARY.define(f"{arguments} -> (Tensor? dx, Tensor? dweight, Tensor? dbias, Tensor? dz)")
    for key in ("CompositeImplicitAutograd", "Batched", "FuncTorchBatched"):  # the others for gradients under vmap
        _LIBRARY.impl(arguments.partition("(")[0], implementation, key)


define_gradients(
    "strict_gradients(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor statistics, Tensor? weight, "
    "Tensor? bias, float eps, int activation, float negative_slope, bool[4] needs)",
    _operator_gradients,
)

# These skip the functorch handling in Function.apply, and functions of Python that search for `backward` in each call.
_apply_train = super(torch.autograd.Function, StrictTrainFunction).apply
StrictTrainFunction._backward_cls.apply = StrictTrainFunction.backward  # type: ignore[attr-defined]


def accepts(
    training: bool, eps: float, activation: str, alpha: float, on_nonfinite: str, on_single: str, channel_dim: int
) -> bool:
    """Return whether `batch_norm` may be called with these options. Layers check theirs when they are set."""
    return (
        (eps >= LEAST_EPS or (eps == 0.0 and not training))
        and activation in ACTIVATIONS
        and -math.inf < alpha < math.inf
        and on_nonfinite in ON_NONFINITE
        and on_single in ON_SINGLE
        and channel_dim in CHANNEL_DIMS
    )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    updates: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    alpha: float,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
    on_nonfinite: str,
    on_single: str,
    channel_dim: int,
    caller: str,
) -> Tensor | None:
    """Compute `functional.batch_norm`, or return None without any effect if that function must do it.

    The options must be valid (`accepts`), except that eps may be 0 in training, because layers accept it. This
    is one long function, because every further call of Python adds to a small layer's time.
    """
    if (
        not AVAILABLE
        or torch.compiler.is_compiling()  # or exporting
        or x.__class__ is not Tensor
        or has_torch_function_variadic(x, running_mean, running_var, weight, bias, residual)
        or _dispatch_modes()
        or _transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
    ):
        return None
    on_gpu = not x.is_cpu  # only now: a mode of __torch_function__, tested above, would see this access
    if on_gpu and (_native is None or not triton.serves(x)):
        return None
    dims, ranks = x.dim(), _RANKS[caller]
    if (
        (dims < 2 if ranks is None else dims not in ranks)
        or (training and (eps == 0.0 or on_nonfinite == "error"))
        or (running_mean is None) != (running_var is None)
        or (running_mean is None and (not training or on_single == "running"))
    ):
        return None
    channels_are_last = channel_dim == -1 and dims > 2
    if channels_are_last:
        if x.is_nested or any(t is not None and t.layout is not torch.strided for t in (x, residual)):
            return None  # they have no movedim
        x, residual = x.movedim(-1, 1), None if residual is None else residual.movedim(-1, 1)
    number = _NUMBERS[activation]
    parameter = (0.0, negative_slope, alpha)[_PARAMETERS[number]]
    if training and (not updates or running_mean is None):
        running_mean = running_var = num_batches_tracked = None
    if _native is None:
        y = _by_operators(
            x, running_mean, running_var, num_batches_tracked, weight, bias, residual, training, eps, number, parameter,
            momentum, on_nonfinite == "skip",
        )  # fmt: skip
    else:
        y = _native.batch_norm(
            x, running_mean, running_var, num_batches_tracked, weight, bias, residual, training, eps, number, parameter,
            residual is not None and known_from_output(activation, parameter), momentum, on_nonfinite == "skip", on_gpu,
        )  # fmt: skip
    return y.movedim(1, -1) if channels_are_last and y is not None else y


def batch_norm_by_parts(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    index: Tensor | None,
    weights: Tensor | None,
    groups: int,
    shared: bool,
    eps: float,
    activation: str,
    parameter: float,
    momentum: float | None,
    on_nonfinite: str,
    on_single: str,
) -> Tensor | None:
    """Compute y and update the running statistics in one call of the node, or return None without any effect.

    `routes.batch_statistics_norm_and_moments` and `routes.update_running_by_parts_` describe the arguments. Without
    running statistics, none are updated.
    """
    if (
        _native is None
        or (index is None and weights is None)
        or on_nonfinite not in _ON_NONFINITE
        or on_single == "running"
        or not takes_parts(x, *running, weight, bias, residual, index, weights)
    ):
        return None
    y: Tensor | None = _native.batch_norm(
        x, *running, weight, bias, residual, True, eps, _NUMBERS[activation], parameter,
        residual is not None and known_from_output(activation, parameter), momentum, on_nonfinite == "skip", False,
        index, weights, groups, shared,
    )  # fmt: skip
    return y


def _by_operators(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    number: int,
    parameter: float,
    momentum: float | None,
    skip_nonfinite: bool,
) -> Tensor | None:
    """Compute y by the strict operators, or return None without any effect."""
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    refused = RefusedError if differentiable else RuntimeError
    try:
        if not training:
            if differentiable:
                return None
            return _normalize(x, running_mean, running_var, weight, bias, residual, eps, number, parameter)
        if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):  # type: ignore[union-attr]
            return None
        options = running_mean, running_var, num_batches_tracked, eps, number, parameter, momentum, skip_nonfinite
        if not differentiable:
            y, _ = _train_forward(x, weight, bias, residual, *options)
            return y
        if not can_be_saved(x, weight, bias, residual):
            return None
        return _apply_train(x, weight, bias, residual, options)
    except refused:
        return None
