"""What a model is run with: given arrays, or random ones of the sizes that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from batchnorm.surgery.fold.onnx.graph import Array
from batchnorm.surgery.fold.onnx.running import Feeds, Outputs, Runner, is_floating

BATCH = 2
# What open sizes are tried with, in this order: images and sequences, and volumes.
SIZES = (64, 224, 32, 16, 8, 128, 512, 4, 1)
SIZES_OF_VOLUMES = (16, 32, 8, 64, 4, 1)


def feeds_of(model: onnx.ModelProto, given: Any, runner: Runner) -> tuple[list[Feeds], list[Outputs]]:
    """Inputs that the model runs with, and the results.

    The first are the given ones, or random ones. Beside given arrays there are random ones of their sizes, and, where
    sizes are open, random ones of others.

    Raises:
        ValueError: The given ones are not what the model takes, or none could be found.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    wanted = [value for value in model.graph.input if value.name not in held]
    known = _known(wanted, given)
    generator = np.random.default_rng(0)
    error: Exception | None = None
    for size in (0,) if len(known) == len(wanted) else SIZES_OF_VOLUMES if _has_volumes(wanted) else SIZES:
        sizes: dict[str, int] = {}
        try:
            feeds = {value.name: _drawn(value, known.get(value.name), size, sizes, generator) for value in wanted}
            found = runner.run(model, feeds)
        except ValueError:
            raise
        except Exception as failed:
            error = failed
            continue
        others = _at_random(model, feeds, known, runner, generator)
        others += _at_another_size(model, wanted, feeds, runner, generator)
        return [feeds, *(f for f, _ in others)], [*found, *(o for _, o in others)]
    told = " ".join(str(error).split())[:300].rstrip(".")
    raise ValueError(
        f"the model must run with its inputs ({', '.join(_described(value) for value in wanted)}), but: {told}. "
        "Give inputs= that it takes, or their shapes."
    ) from error


def _has_volumes(wanted: Sequence[onnx.ValueInfoProto]) -> bool:
    dims = [value.type.tensor_type.shape.dim for value in wanted]
    return any(sum(_is_open(dim) for dim in each[1:]) > 2 for each in dims)


def _known(wanted: Sequence[onnx.ValueInfoProto], given: Any) -> dict[str, Any]:
    """The arrays, or shapes, by name."""
    names = [value.name for value in wanted]
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        one = hasattr(given, "shape") or (len(given) > 0 and all(isinstance(n, int) for n in given))
        each = [given] if one else list(given)
        if len(each) > len(names):
            raise ValueError(f"inputs must be at most {len(names)}, as the model has, got {len(each)}. Leave some out.")
        given = dict(zip(names, each, strict=False))
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"inputs must be named as the model's ({', '.join(names)}), got {unknown[0]!r}. Rename it.")
    return {
        name: tuple(int(n) for n in value) if isinstance(value, (tuple, list)) else np.asarray(value)
        for name, value in given.items()
    }


def _drawn(
    value: onnx.ValueInfoProto, given: Any, size: int, sizes: dict[str, int], generator: np.random.Generator
) -> Array:
    """An array for the input; open sizes of one name are the same for all."""
    kind = value.type.tensor_type
    if isinstance(given, np.ndarray):
        return given.astype(_dtype(kind.elem_type)) if given.dtype.kind == "f" else given
    if isinstance(given, tuple):
        return _random(given, _dtype(kind.elem_type), generator)
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise ValueError(f"inputs must hold {value.name}, whose shape the model does not say. Give it.")
    shape = []
    for axis, dim in enumerate(kind.shape.dim):
        if not _is_open(dim):
            shape.append(dim.dim_value)
        else:
            name = dim.dim_param or f"{value.name} {axis}"
            shape.append(sizes.setdefault(name, BATCH if axis == 0 else size))
    return _random(tuple(shape), _dtype(kind.elem_type), generator)


def _at_random(
    model: onnx.ModelProto, feeds: Feeds, known: dict[str, Any], runner: Runner, generator: np.random.Generator
) -> list[tuple[Feeds, Outputs]]:
    """Random inputs in the place of given arrays, and the results; nothing where the model does not take them."""
    drawn = [name for name, array in feeds.items() if isinstance(known.get(name), np.ndarray) and is_floating(array)]
    if not drawn:
        return []
    other = feeds | {name: _random(feeds[name].shape, feeds[name].dtype, generator) for name in drawn}
    try:
        return [(other, runner.run(model, other)[0])]
    except Exception:
        return []


def _at_another_size(
    model: onnx.ModelProto, wanted: Sequence[onnx.ValueInfoProto], feeds: Feeds, runner: Runner,
    generator: np.random.Generator,
) -> list[tuple[Feeds, Outputs]]:  # fmt: skip
    """Inputs whose open sizes are others, and the results; nothing where there are none, or no others are taken."""

    def resized(axes_too: bool) -> Feeds:
        other = {}
        for value in wanted:
            array, shape = feeds[value.name], []
            dims = value.type.tensor_type.shape.dim
            for axis, n in enumerate(array.shape):
                is_open = axis < len(dims) and _is_open(dims[axis])
                more = n + 1 if axis == 0 else n + max(n // 2, 1) if axes_too else n
                shape.append(more if is_open else n)
            if tuple(shape) == array.shape:
                other[value.name] = array
            elif array.dtype.kind in "iub" and array.size:
                other[value.name] = np.resize(array, shape)
            else:
                other[value.name] = _random(tuple(shape), array.dtype, generator)
        return other

    for axes_too in (True, False):
        other = resized(axes_too)
        if all(other[name].shape == array.shape for name, array in feeds.items()):
            continue
        try:
            return [(other, runner.run(model, other)[0])]
        except Exception:
            continue
    return []


def _is_open(dim: onnx.TensorShapeProto.Dimension) -> bool:
    """Whether the size is not said; some exporters write -1."""
    return not dim.HasField("dim_value") or dim.dim_value < 1


def _dtype(kind: int) -> Any:
    if kind not in helper.get_all_tensor_dtypes() or kind == onnx.TensorProto.STRING:
        raise ValueError(f"inputs must be given for a model that takes {onnx.TensorProto.DataType.Name(kind)}.")
    return helper.tensor_dtype_to_np_dtype(kind)


def _random(shape: tuple[int, ...], dtype: Any, generator: np.random.Generator) -> Array:
    if np.dtype(dtype).kind in "iub":
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)


def _described(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return f"{value.name} {[d.dim_param or '?' if _is_open(d) else d.dim_value for d in dims]}"
