"""Find the batch normalization of a Keras model, and describe it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from batchnorm.keras.layer import BatchNormalization
from batchnorm.models.data.arrays import as_array

STOCK = keras.layers.BatchNormalization

Layer = keras.layers.Layer
Kinds = Callable[[Any], bool]


def is_norm(layer: Any) -> bool:
    """Return whether the layer is Keras's batch normalization, or derives from it."""
    return isinstance(layer, STOCK)


@dataclass(frozen=True)
class Found:
    """A layer, and every path at which the model holds it.

    Attributes:
        paths: The names of the layers that contain it and its own name, joined by dots, such as `backbone.conv1_bn`.
        module: The layer.
    """

    paths: tuple[str, ...]
    module: Any

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]


def norm_layers(model: Any, kinds: Kinds = is_norm) -> list[Found]:
    """Return every layer of batch normalization, once, in the model's order, and the model if it is one itself."""
    paths: dict[int, list[str]] = {}
    layers: dict[int, Any] = {}
    for path, layer in [("", model), *walk(model)]:
        if kinds(layer):
            layers[id(layer)] = layer
            paths.setdefault(id(layer), []).append(path)
    return [Found(tuple(paths[key]), layer) for key, layer in layers.items()]


def walk(layer: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path of every layer inside, and the layer; a layer that is held twice comes twice."""
    for child in children(layer):
        path = f"{prefix}.{child.name}" if prefix else child.name
        yield path, child
        yield from walk(child, path)


def children(layer: Any) -> list[Any]:
    """Return the layers that the layer holds itself."""
    return list(layer._flatten_layers(include_self=False, recursive=False))


def check_model(caller: str, model: Any) -> list[Found]:
    """Return the model's layers of batch normalization.

    Raises:
        TypeError: it is not a Keras layer.
        ValueError: it has no batch normalization, or some of it has not been built.
    """
    if not isinstance(model, Layer):
        raise TypeError(
            f"{caller} expects a Keras model, got {type(model).__name__}. For PyTorch, use batchnorm.{caller}."
        )
    found = norm_layers(model)
    if not found:
        raise ValueError(
            f"{caller} expects a model with batch normalization, got {type(model).__name__} {model.name!r} without "
            "any. Pass the model that contains the layers."
        )
    unbuilt = next((layer.path for layer in found if not layer.module.built), None)
    if unbuilt is not None:
        raise ValueError(
            f"{caller} expects layers with variables, got {unbuilt!r}, which has not been built. "
            "Call the model once, or model.build(input_shape)."
        )
    return found


def describe(layer: Any, kind: type[Any] | None = None) -> str:
    """Return a short description, such as `keras.layers.BatchNormalization(64)`, with the layer's class or another."""
    kind = kind or type(layer)
    package = {"keras": "keras.layers.", "batchnorm": "batchnorm.keras."}.get(kind.__module__.split(".")[0], "")
    return f"{package}{kind.__name__}({channels_of(layer)})"


def named(layer: Any) -> str:
    """Return the name and the class of a layer or operation, for messages."""
    return f"{layer.name} ({type(layer).__name__})"


def reason_of(error: Exception) -> str:
    """Return the message of an exception in one line without a full stop, for the middle of a message.

    Keras adds its own text around the message, which is bold.
    """
    own = re.search(r"\x1b\[1m(.*?)\x1b\[0m", str(error), re.DOTALL)
    return " ".join((own[1] if own else str(error)).split())[:300].rstrip(".")


def channels_of(layer: Any) -> int:
    """Return the number of channels of built batch normalization."""
    return int(layer.moving_mean.shape[0])


def as_numpy(value: Any) -> NDArray[Any]:
    """Return a copy of a variable or tensor as an array; bfloat16 of PyTorch as float32."""
    return np.array(as_array(getattr(value, "value", value)))


def array(value: Any) -> NDArray[np.float64]:
    """Return a variable or tensor of the backend in float64."""
    return as_numpy(value).astype(np.float64)


def channel_axis(layer: Any, rank: int) -> int:
    """Return the channel axis of an input or output of this rank, according to the layer's `data_format`."""
    return 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1


def largest(dtype: str) -> float:
    """Return the largest finite value of a variable's dtype, as Keras names it."""
    known: dict[str, Any] = {"float16": np.float16, "float64": np.float64}
    return float(np.finfo(known.get(dtype, np.float32)).max)  # bfloat16 has nearly the range of float32


def has_own_call(layer: Any, kind: type[Any]) -> bool:
    """Return whether a subclass of `kind` computes something else."""
    return type(layer).call is not kind.call


def is_known_norm(norm: Any) -> bool:
    """Return whether batch normalization computes what Keras's layer or this library's computes."""
    known = STOCK if type(norm) is STOCK else BatchNormalization
    return isinstance(norm, known) and not has_own_call(norm, known)
