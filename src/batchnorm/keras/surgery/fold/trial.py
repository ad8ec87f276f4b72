"""Compute a Keras model before and after folding, and in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import keras
import numpy as np
from keras import tree
from numpy.typing import NDArray

from batchnorm.keras.models.copying import Copy, functional, is_graph, nodes_of
from batchnorm.keras.models.layers import as_numpy, walk

# The size of an input along an axis whose size is open.
_OPEN = 32
_SAMPLES = 2

# Options of XLA for a program that runs once: compiling it takes longer than running it.
_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

Values = dict[int, NDArray[Any]]


def in_float64() -> AbstractContextManager[Any]:
    """Let the backend compute in float64, which JAX does not do by default."""
    if keras.backend.backend() != "jax":
        return nullcontext()
    import jax
    from jax import experimental

    # jax 0.8 moved the function.
    enable: Any = getattr(jax if hasattr(jax, "enable_x64") else experimental, "enable_x64")  # noqa: B009
    wide: AbstractContextManager[Any] = enable(True)
    return wide


def random_inputs(model: Any, seed: int = 0) -> Any:
    """Return random inputs of the shapes that the model takes."""
    generator = np.random.default_rng(seed)

    def of(tensor: Any) -> NDArray[Any]:
        shape = [_OPEN if size is None else size for size in tensor.shape]
        if tensor.shape[0] is None:
            shape[0] = _SAMPLES
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if "float" in dtype:
            return generator.standard_normal(shape, np.float32)
        return generator.integers(0, 2, shape).astype(dtype)

    return tree.map_structure(of, functional(model).input)


def values_of(model: Any, copy: Copy | None, inputs: Any, wanted: Sequence[Any]) -> Values:
    """Run a model, or a copy of it, in evaluation. Return the values of its results and of the wanted tensors.

    Args:
        model: The original, whose graph names the tensors.
        copy: The copy to run; None runs the original.
        inputs: The inputs, in the structure that the model takes.
        wanted: Tensors of the original or of the models inside.

    Returns:
        The values by the id of the original's tensor.
    """
    ids = {id(tensor) for tensor in (*wanted, *model.outputs)}
    return dict(_values(model, {} if copy is None else copy.tensors, tree.flatten(inputs), ids))


def _values(model: Any, tensors: Mapping[int, Any], inputs: list[Any], wanted: set[int]) -> Iterator[tuple[int, Any]]:
    def current(tensor: Any) -> Any:
        return tensors.get(id(tensor), tensor)

    nodes = nodes_of(model)
    own = {id(tensor): tensor for node in nodes for tensor in node.outputs}
    nested = [node for node in nodes if is_graph(node.operation) and _contains(node.operation, wanted)]
    needed = {key: tensor for key, tensor in own.items() if key in wanted}
    needed |= {id(tensor): tensor for node in nested for tensor in node.input_tensors}
    if not needed:
        return
    given = [current(tensor) for tensor in model.inputs]
    results = _run(keras.Model(given, [current(tensor) for tensor in needed.values()]), inputs)
    found = dict(zip(needed, tree.flatten(results), strict=True))
    for node in nested:
        yield from _values(node.operation, tensors, [found[id(tensor)] for tensor in node.input_tensors], wanted)
    yield from ((key, as_numpy(value)) for key, value in found.items() if key in wanted)


def _run(model: Any, inputs: list[Any]) -> Any:
    """Run a model in evaluation; on JAX as one program, because compiling each operation by itself takes longer."""
    if keras.backend.backend() == "jax":
        import jax

        def call(trained: list[Any], others: list[Any], inputs: list[Any]) -> Any:
            return model.stateless_call(trained, others, inputs, training=False)[0]

        variables = ([v.value for v in part] for part in (model.trainable_variables, model.non_trainable_variables))
        with suppress(Exception):  # for example, if the code of a layer reads values
            return jax.jit(call, compiler_options=_QUICKLY)(*variables, inputs)
    return model(inputs, training=False)


def _contains(model: Any, wanted: set[int]) -> bool:
    graphs = [model, *(layer for _, layer in walk(model) if is_graph(layer))]
    return any(id(tensor) in wanted for graph in graphs for node in nodes_of(graph) for tensor in node.outputs)
