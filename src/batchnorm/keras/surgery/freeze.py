"""Freeze the statistics of the batch normalization of a Keras model, and unfreeze them."""

from __future__ import annotations

import keras

from batchnorm.keras.models.layers import Found, describe, walk
from batchnorm.keras.surgery.replacement import Left, NewLayer, replace_layers
from batchnorm.models.report import Report, Result
from batchnorm.models.selection import Choice


def freeze(model: keras.layers.Layer, *, only: Choice | None = None) -> Result[Report]:
    """Return a copy whose batch normalization uses its moving statistics in training too, without updating them.

    Each layer gets `trainable=False`, which also stops the training of γ and β. Keras sets `trainable` of all layers
    inside when `model.trainable` is set: `model.trainable = True` undoes this function.

    Args:
        model: A built Keras model, or a layer; it stays unchanged.
        only: The layers to freeze, as in `convert`.

    Returns:
        The copy, which is not compiled, and the report.

    Raises:
        TypeError: the model is not a Keras model.
        ValueError: as for `convert`.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> frozen, report = freeze(model)
        >>> frozen.layers[0].trainable, unfreeze(frozen).model.layers[0].trainable
        (False, True)
    """

    def choose(found: Found) -> NewLayer:
        layer = found.module
        if not layer.trainable:
            raise Left("it is frozen already")
        return NewLayer(type(layer), {**layer.get_config(), "trainable": False}, f"frozen {describe(layer)}")

    return replace_layers("freeze", model, choose, only=only)


def unfreeze(model: keras.layers.Layer, *, only: Choice | None = None) -> Result[Report]:
    """Return a copy whose frozen batch normalization trains and updates its statistics again.

    Args:
        model: A built Keras model, or a layer; it stays unchanged.
        only: The layers to restore, as in `convert`.

    Returns:
        The copy, which is not compiled, and the report. A layer is left if a layer that contains it is frozen,
        because that one was frozen with everything inside.

    Raises:
        TypeError: the model is not a Keras model.
        ValueError: as for `convert`.
    """
    frozen = {path: layer for path, layer in [("", model), *walk(model)] if not layer.trainable}

    def choose(found: Found) -> NewLayer:
        layer = found.module
        if layer.trainable:
            raise Left("it is not frozen")
        for path, outer in frozen.items():
            if outer is not layer and (not path or found.path.startswith(f"{path}.")):
                raise Left(f"{path or 'the model'} is frozen: set its trainable first")
        return NewLayer(type(layer), {**layer.get_config(), "trainable": True}, describe(layer), "was frozen")

    return replace_layers("unfreeze", model, choose, only=only)
