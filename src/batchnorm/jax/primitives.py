"""Turn compositions into JAX primitives, with a kernel on the CPU and a transpose that we define.

A primitive's arguments are a tree of arrays, in which absent arrays are None.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from batchnorm.jax import kernels
from batchnorm.jax.composition import Attributes

Composition = Callable[..., Any]


def operator(composition: Composition) -> Composition:
    """Return the composition as a primitive, which on the CPU is a kernel; its derivatives are the composition's."""
    primitive, bind = _primitive(composition)

    def jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        _, dots = jax.jvp(functools.partial(_flat, composition, **params), list(primals), tangents)
        return primitive.bind(*primals, **params), dots

    def batch(arguments: Sequence[Array], dims: Sequence[int | None], **params: Any) -> Any:
        """Run one example after the other, each on all threads."""
        batched = [jnp.moveaxis(a, d, 0) for a, d in zip(arguments, dims, strict=True) if d is not None]

        def one(examples: list[Array]) -> Any:
            rest = iter(examples)
            return primitive.bind(
                *(a if d is None else next(rest) for a, d in zip(arguments, dims, strict=True)), **params
            )

        out = lax.map(one, batched)
        return out, [0] * len(out)

    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    lowering = kernels.lowering(composition.__name__, functools.partial(_flat, composition))
    mlir.register_lowering(primitive, lowering, platform="cpu")
    return bind


def linear(composition: Composition, transpose: Composition) -> Composition:
    """Return a composition as a primitive with its own transpose.

    Args:
        composition: `(linear, constants, at) -> results`, linear in `linear`, a tuple of arrays or None.
        transpose: `(cotangents, constants, at) -> linear`, for the cotangents of the results. Where an element of the
            argument `linear` is None, the result's is ignored.
    """
    primitive, bind = _primitive(composition)

    def jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
        tangents = [ad.instantiate_zeros(t) for t in tangents]
        n = len(jax.tree.leaves(jax.tree.unflatten(params["tree"], primals)[0]))
        out = primitive.bind(*primals, **params)
        dots = primitive.bind(*tangents[:n], *primals[n:], **params)  # linear, so that the transpose applies again
        flat = functools.partial(_flat, composition, **params)
        _, more = jax.jvp(lambda *constants: flat(*primals[:n], *constants), list(primals[n:]), list(tangents[n:]))
        return out, [a + b for a, b in zip(dots, more, strict=True)]

    def transposed(cotangents: Sequence[Any], *arguments: Any, tree: Any, at: Attributes) -> list[Any]:
        arrays, constants = jax.tree.unflatten(tree, arguments)
        found = transpose([ad.instantiate_zeros(ct) for ct in cotangents], constants, at)
        gradients = [
            ct.astype(array.aval.dtype) if ad.is_undefined_primal(array) else None
            for ct, array in zip(found, arrays, strict=True)
            if array is not None
        ]
        return gradients + [None] * (len(arguments) - len(gradients))

    @functools.cache
    def mapped(batched: tuple[bool, ...]) -> Composition:
        """Return the primitive that maps this one over the first axis, which the constants have where `batched`.

        Only some versions of JAX can transpose a loop over this primitive. The loop therefore has its own transpose.
        """

        def over(function: Composition, arrays: Any, constants: Any) -> Any:
            leaves, tree = jax.tree.flatten(constants)
            fixed = [None if moves else leaf for leaf, moves in zip(leaves, batched, strict=True)]
            moving = [leaf for leaf, moves in zip(leaves, batched, strict=True) if moves]

            def one(example: Any) -> Any:
                arrays, own = example[0], iter(example[1])
                whole = [next(own) if moves else leaf for leaf, moves in zip(fixed, batched, strict=True)]
                return function(arrays, jax.tree.unflatten(tree, whole))

            return lax.map(one, (arrays, moving))

        def composed(arrays: Any, constants: Any, at: Attributes) -> Any:
            return over(lambda arrays, constants: composition(arrays, constants, at), arrays, constants)

        def composed_transpose(cotangents: Any, constants: Any, at: Attributes) -> Any:
            return over(lambda cotangents, constants: transpose(cotangents, constants, at), cotangents, constants)

        composed.__name__ = f"{composition.__name__}_mapped"
        return linear(composed, composed_transpose)

    def batch(arguments: Sequence[Array], dims: Sequence[int | None], *, tree: Any, at: Attributes) -> Any:
        n = len(jax.tree.leaves(jax.tree.unflatten(tree, arguments)[0]))
        size = _batch_size(arguments, dims)
        moved = [a if d is None else jnp.moveaxis(a, d, 0) for a, d in zip(arguments, dims, strict=True)]
        for i in range(n):
            if dims[i] is None:
                moved[i] = jnp.broadcast_to(moved[i], (size, *moved[i].shape))
        out = mapped(tuple(d is not None for d in dims[n:]))(*jax.tree.unflatten(tree, moved), at)
        return out, [0] * len(out)

    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transposed
    batching.primitive_batchers[primitive] = batch
    return bind


def _batch_size(arguments: Sequence[Array], dims: Sequence[int | None]) -> int:
    return next(a.shape[d] for a, d in zip(arguments, dims, strict=True) if d is not None)


def _flat(composition: Composition, *leaves: Any, tree: Any, at: Attributes) -> list[Array]:
    return jax.tree.leaves(composition(*jax.tree.unflatten(tree, leaves), at))


def _primitive(composition: Composition) -> tuple[Primitive, Composition]:
    """Return a primitive without its rules for derivatives and batches, and the function that calls it."""
    primitive = Primitive(f"batchnorm_{composition.__name__}")
    primitive.multiple_results = True
    flat = functools.partial(_flat, composition)

    def abstract(*avals: Any, **params: Any) -> Any:
        return jax.make_jaxpr(functools.partial(flat, **params))(*avals).out_avals

    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("tree", "at")))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(flat, multiple_results=True))

    def bind(*arguments: Any) -> Any:
        *trees, at = arguments
        leaves, tree = jax.tree.flatten(tuple(trees))
        return primitive.bind(*alike(*leaves), tree=tree, at=at)

    return primitive, bind


def alike(*arrays: Array) -> list[Array]:
    """Make all arrays vary over the axes of `shard_map` over which any does.

    JAX then sums the gradients of a replicated parameter over the devices.
    """
    axes: frozenset[Any] = frozenset().union(*map(_varies_over, arrays))
    return [_vary(array, tuple(axes - _varies_over(array))) for array in arrays]


def _varies_over(array: Array) -> frozenset[Any]:
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    kind = getattr(kind, "manual_axis_type", kind)  # from JAX 0.9 on
    return getattr(kind, "varying", None) or getattr(kind, "vma", None) or frozenset()


def _vary(array: Array, axes: tuple[Any, ...]) -> Array:
    if not axes:
        return array
    return lax.pcast(array, axes, to="varying") if hasattr(lax, "pcast") else lax.pvary(array, axes)  # type: ignore[attr-defined]
