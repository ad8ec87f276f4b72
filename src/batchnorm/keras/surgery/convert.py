"""Replace the batch normalization of a Keras model by that of another class."""

from __future__ import annotations

from typing import Any

import keras

from batchnorm.keras.layer import BatchNormalization
from batchnorm.keras.models.layers import STOCK, Found, is_known_norm
from batchnorm.keras.surgery.replacement import Left, NewLayer, replace_layers
from batchnorm.models.report import Report, Result
from batchnorm.models.selection import Selection


def convert(
    model: keras.layers.Layer, to: type[Any] = BatchNormalization, *, only: Selection | None = None, **options: Any
) -> Result[Report]:
    """Return a copy of the model with another class of batch normalization, which has the same variables.

    Sequential, functional and nested models are rebuilt from their graphs. A subclassed model or layer must define
    `get_config`, and hold its layers in attributes, lists or dicts that `__init__` fills. A layer that is used in
    several places stays one layer. The given model stays unchanged, and there is no `inplace=`: the graph of a
    functional model cannot call another layer than the one it was built with. The copy is not compiled.

    Args:
        model: A built Keras model, or a layer.
        to: The class: `batchnorm.keras.BatchNormalization`, or `keras.layers.BatchNormalization` to convert back.
        only: The layers to replace: a pattern for paths such as `"backbone.*"`, several patterns, a class, or a
            predicate of path and layer. A path consists of the names of layers, joined by dots.
        **options: Arguments of the class, such as `renorm=True` or `momentum=0.9`. Others are taken from the layer.
            With `renorm=True`, the averages of batch renormalization start at the moving statistics.

    Returns:
        The copy, and the report. A layer is left if the class would lose something that the layer does, or change
        nothing.

    Raises:
        TypeError: the model is not a Keras model, or `to` is not batch normalization or does not take an option.
        ValueError: the model has no batch normalization or is not built; a pattern matches no layer; a layer cannot be
            created from its configuration.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="norm")])
        >>> converted, report = convert(model)
        >>> print(report)
        convert: 1 changed, 0 left
        <BLANKLINE>
        layer  was                                 now                                     why
        norm   keras.layers.BatchNormalization(4)  batchnorm.keras.BatchNormalization(4)
    """
    if not (isinstance(to, type) and issubclass(to, STOCK)):
        raise TypeError(
            f"convert expects `to` to be a class of batch normalization, got {to!r:.80}. Pass "
            "batchnorm.keras.BatchNormalization or keras.layers.BatchNormalization."
        )

    def choose(found: Found) -> NewLayer:
        layer = found.module
        own = layer.get_config()
        if type(layer) is to and all(own.get(name) == value for name, value in options.items()):
            raise Left("it is one already")
        config = {**_configuration(layer, to, own), **options}
        for option, variable in (("scale", "gamma"), ("center", "beta")):
            if getattr(layer, variable) is not None and not config[option]:
                raise Left(f"its {variable} would be lost with {option}={config[option]}")
        return NewLayer(to, config)

    return replace_layers("convert", model, choose, only=only)


def _configuration(layer: Any, to: type[Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the layer's configuration for another class.

    Raises:
        Left: the class would lose something.
    """
    if not is_known_norm(layer):
        raise Left(f"{type(layer).__name__} computes something else: it has a call of its own")
    if issubclass(to, BatchNormalization):
        return own
    lost = {name: value for name, value in own.items() if name not in STOCK().get_config()}
    if own.get("synchronized") and keras.backend.backend() != "tensorflow":
        lost["synchronized"] = True
    if lost:
        named = ", ".join(f"{name}={value!r}" for name, value in lost.items())
        raise Left(f"keras.layers.BatchNormalization has no {named}")
    return own
