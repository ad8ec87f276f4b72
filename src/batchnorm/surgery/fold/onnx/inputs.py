"""Inputs to run a model with: given arrays, or random ones of the sizes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from batchnorm._options import as_clause
from batchnorm.surgery.fold.onnx.graph import Array
from batchnorm.surgery.fold.onnx.running import Feeds, Runner, is_floating

BATCH = 2
# Sizes that are tried for open axes, in this order: for images and sequences, and for volumes.
SIZES = (64, 224, 32, 16, 8, 128, 512, 4, 1)
SIZES_OF_VOLUMES = (16, 32, 8, 64, 4, 1)


def feeds_of(model: onnx.ModelProto, given: Any, runner: Runner) -> list[Feeds]:
    """Return inputs that the model runs with.

    The first inputs are the given ones, or random ones. Random inputs of the same sizes follow given arrays. If sizes
    are open, random inputs of other sizes follow, if the model runs with them.

    Raises:
        ValueError: The model does not take the given inputs, or none were found that it takes.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    wanted = [value for value in model.graph.input if value.name not in stored]
    known = _known(wanted, given)
    generator = np.random.default_rng(0)
    error = Exception("no size was tried")
    for size in (0,) if len(known) == len(wanted) else SIZES_OF_VOLUMES if _has_volumes(wanted) else SIZES:
        sizes: dict[str, int] = {}
        feeds = {value.name: _drawn(value, known.get(value.name), size, sizes, generator) for value in wanted}
        try:
            runner.run(model, feeds)
        except Exception as failure:
            error = failure
            continue
        arrays = [name for name, value in known.items() if isinstance(value, np.ndarray) and is_floating(feeds[name])]
        redrawn = feeds | {name: _random(feeds[name].shape, feeds[name].dtype, generator) for name in arrays}
        resized = [_resized(wanted, feeds, every_axis, generator) for every_axis in (True, False)]
        others = (_first_that_runs(model, candidates, feeds, runner) for candidates in ([redrawn], resized))
        return [feeds, *(other for found in others for other in found)]
    raise ValueError(
        f"fold_onnx expects a model that runs with its inputs ({', '.join(_described(value) for value in wanted)}), "
        f"but: {as_clause(error)}. Pass inputs= that it takes, or their shapes."
    ) from error


def _first_that_runs(model: onnx.ModelProto, candidates: list[Feeds], feeds: Feeds, runner: Runner) -> list[Feeds]:
    for candidate in candidates:
        if all(candidate[name] is array for name, array in feeds.items()):
            continue  # nothing was changed
        try:
            runner.run(model, candidate)
        except Exception:  # the model does not take these
            continue
        return [candidate]
    return []


def _has_volumes(wanted: Sequence[onnx.ValueInfoProto]) -> bool:
    dims = [value.type.tensor_type.shape.dim for value in wanted]
    return any(sum(_is_open(dim) for dim in each[1:]) > 2 for each in dims)


def _known(wanted: Sequence[onnx.ValueInfoProto], given: Any) -> dict[str, Any]:
    """Return the given arrays, or shapes, by name."""
    names = [value.name for value in wanted]
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        one = hasattr(given, "shape") or (len(given) > 0 and all(isinstance(n, int) for n in given))
        each = [given] if one else list(given)
        if len(each) > len(names):
            raise ValueError(
                f"fold_onnx expects at most {len(names)} inputs, as the model has, got {len(each)}. Leave some out."
            )
        given = dict(zip(names, each, strict=False))
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"fold_onnx expects inputs named as the model's ({', '.join(names)}), got {unknown[0]!r}. Rename it."
        )
    return {
        name: tuple(int(n) for n in value) if isinstance(value, (tuple, list)) else np.asarray(value)
        for name, value in given.items()
    }


def _drawn(
    value: onnx.ValueInfoProto, given: Any, size: int, sizes: dict[str, int], generator: np.random.Generator
) -> Array:
    """Return an array for the input. Open sizes of the same name are equal."""
    kind = value.type.tensor_type
    if isinstance(given, np.ndarray):
        return given.astype(_dtype(kind.elem_type)) if given.dtype.kind == "f" else given
    if isinstance(given, tuple):
        return _random(given, _dtype(kind.elem_type), generator)
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(
            f"fold_onnx expects inputs= to include {value.name}, whose shape the model leaves open, got none. Pass it."
        )
    shape = []
    for axis, dim in enumerate(kind.shape.dim):
        if not _is_open(dim):
            shape.append(dim.dim_value)
        else:
            name = dim.dim_param or f"{value.name} {axis}"
            shape.append(sizes.setdefault(name, BATCH if axis == 0 else size))
    return _random(tuple(shape), _dtype(kind.elem_type), generator)


def _resized(
    wanted: Sequence[onnx.ValueInfoProto], feeds: Feeds, every_axis: bool, generator: np.random.Generator
) -> Feeds:
    """Return inputs with other sizes along open axes: the first axis or every axis."""
    other = dict(feeds)
    for value in wanted:
        array, dims = feeds[value.name], value.type.tensor_type.shape.dim
        is_open = [axis < len(dims) and _is_open(dims[axis]) for axis in range(array.ndim)]
        more = [1 if axis == 0 else max(n // 2, 1) if every_axis else 0 for axis, n in enumerate(array.shape)]
        shape = tuple(n + m if change else n for n, m, change in zip(array.shape, more, is_open, strict=True))
        if shape != array.shape:
            keep = array.dtype.kind in "iub" and array.size
            other[value.name] = np.resize(array, shape) if keep else _random(shape, array.dtype, generator)
    return other


def _is_open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Return whether the size is not fixed; some exporters write -1."""
    return not dim.HasField("dim_value") or dim.dim_value < 1


def _dtype(kind: int) -> Any:
    if kind not in helper.get_all_tensor_dtypes() or kind == onnx.TensorProto.STRING:
        raise ValueError(
            f"fold_onnx expects arrays in inputs= for a model that takes {onnx.TensorProto.DataType.Name(kind)}, got "
            "none. Pass them."
        )
    return helper.tensor_dtype_to_np_dtype(kind)


def _random(shape: tuple[int, ...], dtype: Any, generator: np.random.Generator) -> Array:
    try:
        if np.dtype(dtype).kind in "iub":
            return generator.integers(0, 2, shape).astype(dtype)
        return generator.standard_normal(shape).astype(dtype)
    except (MemoryError, OverflowError, ValueError) as error:
        raise ValueError(
            f"fold_onnx expects inputs whose arrays fit into memory, got {list(shape)}. Choose smaller sizes."
        ) from error


def _described(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return f"{value.name} {[d.dim_param or '?' if _is_open(d) else d.dim_value for d in dims]}"
