"""Create chosen layers of batch normalization anew in a copy of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras

from batchnorm.keras.models.copying import copied
from batchnorm.keras.models.layers import Found, array, as_numpy, check_model, describe
from batchnorm.models.report import Change, Report, Result
from batchnorm.models.selection import Selection, select


class Left(Exception):
    """The reason why a layer is left."""


@dataclass(frozen=True)
class NewLayer:
    """The layer that takes another's place.

    Attributes:
        kind: Its class.
        config: Its configuration.
    """

    kind: type[Any]
    config: dict[str, Any]


def replace_layers(
    caller: str, model: keras.layers.Layer, choose: Callable[[Found], NewLayer], *, only: Selection | None
) -> Result[Report]:
    """Return a copy with other layers, and the report.

    Args:
        caller: The function that the user called.
        model: The model, which stays unchanged.
        choose: Returns the new layer for a layer; raises `Left` if it stays.
        only: The user's choice.
    """
    makers: dict[int, Callable[[], Any]] = {}
    changed, left = [], []
    for found in select(caller, check_model(caller, model), only):
        layer, was = found.module, describe(found.module)
        try:
            new = choose(found)
        except Left as reason:
            left.append(Change.unchanged(found.path, was, str(reason)))
            continue
        _check_options(caller, new)
        makers[id(layer)] = partial(new.kind.from_config, new.config)
        changed.append(Change(found.path, was, describe(layer, new.kind)))
    copy = copied(caller, model, makers)
    for old, replaced in copy.replaced:
        copy_variables(old, replaced)
    return Result(copy.model, Report(caller, tuple(changed), tuple(left), notes=not_compiled(model)))


def not_compiled(model: keras.layers.Layer) -> tuple[str, ...]:
    """Return the note on the copy of a compiled model."""
    compiled = getattr(model, "compiled", False)
    return ("the copy is not compiled: call compile() before you train it",) if compiled else ()


def _check_options(caller: str, new: NewLayer) -> None:
    """Check that the class takes the configuration, before anything is copied."""
    try:
        new.kind.from_config(dict(new.config))
    except TypeError as error:
        reason = " ".join(str(error).rpartition("Exception encountered:")[2].split()).rstrip(".")
        raise TypeError(
            f"{caller} expects options that {new.kind.__name__} takes, got others: {reason}. Pass arguments of its "
            "constructor."
        ) from error


def copy_variables(old: Any, new: Any) -> None:
    """Copy the variables of batch normalization. Averages that only `new` has start at the moving statistics."""
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        if getattr(old, name) is not None:
            getattr(new, name).assign(as_numpy(getattr(old, name)))
    if getattr(new, "renorm", False):  # Keras before 3.13 has none
        start_renorm(new)
        for name in ("moving_stddev", "renorm_mean", "renorm_stddev") if getattr(old, "renorm", False) else ():
            getattr(new, name).assign(as_numpy(getattr(old, name)))


def start_renorm(layer: Any) -> None:
    """Set the averages of batch renormalization to the moving statistics."""
    deviation = (array(layer.moving_variance) + layer.epsilon) ** 0.5
    for name, value in (
        ("moving_stddev", deviation),
        ("renorm_mean", array(layer.moving_mean)),
        ("renorm_stddev", deviation),
    ):
        getattr(layer, name).assign(value)
