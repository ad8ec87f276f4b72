"""Call the compiled kernels from XLA on the CPU, through its foreign function interface.

An operator whose kernel cannot be used is lowered as its composition:

- if there are no kernels, for the reason that `batchnorm.backends()` gives;
- under a `jit` over several devices, because XLA can divide a composition between devices, but not a call of a kernel:
  it would first gather the whole array on every device. Within `shard_map` and `pmap`, each device runs the kernel;
- if the weights of a mask differ by channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.interpreters import mlir

from batchnorm.compiled import xla_kernels
from batchnorm.jax.composition import Attributes

_TARGETS = ("train_forward", "moments", "normalize", "backward")


def _register() -> bool:
    library = xla_kernels().library
    if library is None:
        return False
    for name in _TARGETS:
        symbol = f"batchnorm_xla_{name}"
        jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return True


REGISTERED = _register()


class _Value(NamedTuple):
    """An operand of a call, or a result, which has no value yet."""

    aval: Any
    operand: Any = None


class Call(NamedTuple):
    """A call of a kernel: its arguments and results in order, where None is absent."""

    target: str
    arguments: Sequence[_Value | None]
    results: Sequence[_Value | None]


def _train_forward(out: Sequence[_Value], *arguments: Any) -> Call:
    return Call("train_forward", arguments, out)


def _moments(out: Sequence[_Value], *arguments: Any) -> Call:
    return Call("moments", arguments, out)


def _normalize(out: Sequence[_Value], kept: Sequence[Any]) -> Call:
    return Call("normalize", kept, out)


def _backward_reduce(out: Sequence[_Value], dy: Any, kept: Sequence[Any]) -> Call:
    return Call("backward", (dy, *kept, None, None, None), (*out, None, None))


def _backward_apply(
    out: Sequence[_Value], dy: Any, mean_dxhat: Any, mean_dxhat_xhat: Any, kept: Sequence[Any], weights: Any
) -> Call:
    return Call("backward", (dy, *kept, mean_dxhat, mean_dxhat_xhat, weights), (None, None, *_with_dz(out)))


def _train_backward(out: Sequence[_Value], dy: Any, kept: Sequence[Any], weights: Any) -> Call:
    return Call("backward", (dy, *kept, None, None, weights), (*out[:2], *_with_dz(out[2:])))


def _with_dz(out: Sequence[_Value]) -> tuple[_Value | None, ...]:
    return (*out, None)[:2]


_CALLS: dict[str, Callable[..., Call]] = {
    "train_forward": _train_forward,
    "moments": _moments,
    "normalize": _normalize,
    "backward_reduce": _backward_reduce,
    "backward_apply": _backward_apply,
    "train_backward": _train_backward,
}
_WITH_WEIGHTS = ("moments", "backward_apply")  # the last argument is the weights of a mask


def lowering(name: str, flat: Callable[..., Any]) -> Callable[..., Any]:
    """Return the rule that lowers the operator `name` on the CPU.

    Args:
        name: A function of `batchnorm.jax.composition`.
        flat: This function with its arrays as positional arguments, and the keywords `tree` and `at`.
    """
    composed = mlir.lower_fun(flat, multiple_results=True)

    def rule(ctx: Any, *operands: Any, tree: Any, at: Attributes) -> Any:
        given = jax.tree.unflatten(tree, list(map(_Value, ctx.avals_in, operands)))
        if not REGISTERED or _divided_by_xla(ctx.module_context.axis_context) or _weights_by_channel(name, given):
            return composed(ctx, *operands, tree=tree, at=at)
        return _emit(ctx, _CALLS[name](list(map(_Value, ctx.avals_out)), *given), at)

    return rule


def _divided_by_xla(context: Any) -> bool:
    """Return whether XLA divides arrays between devices, as it does under `jit` outside of `shard_map` and `pmap`."""
    mesh = getattr(context, "mesh", None)
    if mesh is not None:
        return set(mesh.axis_names) != set(context.manual_axes) and mesh.size > 1
    return getattr(context, "num_devices", 1) > 1


def _weights_by_channel(name: str, given: Sequence[Any]) -> bool:
    if name not in _WITH_WEIGHTS or given[-1] is None:
        return False
    return bool(given[-1].aval.ndim == given[0].aval.ndim)  # x, or dy, which has its shape


def _emit(ctx: Any, call: Call, at: Attributes) -> list[Any]:
    absent = _Value(jax.core.ShapedArray((0,), np.dtype(np.float32)), None)
    arguments = [absent if value is None else value for value in call.arguments]
    results = [absent if value is None else value for value in call.results]
    none = mlir.ir_constant(np.zeros(0, np.float32))
    rule = jax.ffi.ffi_lowering(f"batchnorm_xla_{call.target}")
    out = rule(
        ctx.replace(avals_in=[value.aval for value in arguments], avals_out=[value.aval for value in results]),
        *(none if value.operand is None else value.operand for value in arguments),
        axis=np.int64(at.axis), eps=np.float64(at.eps), activation=at.activation, parameter=np.float64(at.parameter),
    )  # fmt: skip
    return [value for value, result in zip(out, call.results, strict=True) if result is not None]
