"""Freeze the statistics of the batch normalization of a Keras model, and unfreeze them."""

from __future__ import annotations

from collections.abc import Callable

import keras

from batchnorm.keras.models.copying import IN_PLACE, copied
from batchnorm.keras.models.layers import Found, check_model, describe, walk
from batchnorm.keras.surgery.replacement import not_compiled
from batchnorm.models.report import Change, Report, Result
from batchnorm.models.selection import Selection, select


def freeze(model: keras.layers.Layer, *, only: Selection | None = None, inplace: bool = False) -> Result[Report]:
    """Let batch normalization use its moving statistics in training too, without updating them.

    Each layer gets `trainable=False`, which also stops the training of γ and β. Keras sets `trainable` of all layers
    inside when `model.trainable` is set: `model.trainable = True` undoes this function.

    Args:
        model: A built Keras model, or a layer.
        only: The layers to freeze, as in `convert`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, which is not compiled if it is a copy, and the report.

    Raises:
        TypeError: the model is not a Keras model.
        ValueError: as for `convert`. With `inplace`, a subclassed model needs no `get_config`.

    Examples:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> frozen, report = freeze(model)
        >>> frozen.layers[0].trainable, unfreeze(frozen).model.layers[0].trainable
        (False, True)
    """

    def reason(model: keras.layers.Layer, found: Found) -> str | None:
        return None if found.module.trainable else "it is frozen already"

    return _set_trainable("freeze", model, False, reason, only, inplace)


def unfreeze(model: keras.layers.Layer, *, only: Selection | None = None, inplace: bool = False) -> Result[Report]:
    """Let frozen batch normalization train and update its statistics again.

    Args:
        model: A built Keras model, or a layer.
        only: The layers to restore, as in `convert`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, which is not compiled if it is a copy, and the report. A layer stays frozen if a layer that contains
        it is frozen: the outer layer must be unfrozen first.

    Raises:
        TypeError: the model is not a Keras model.
        ValueError: as for `freeze`.
    """

    def reason(model: keras.layers.Layer, found: Found) -> str | None:
        if found.module.trainable:
            return "it is not frozen"
        for path, outer in [("", model), *walk(model)]:
            if not outer.trainable and outer is not found.module and (not path or found.path.startswith(f"{path}.")):
                return f"{path or 'the model'} is frozen: set its trainable first"
        return None

    return _set_trainable("unfreeze", model, True, reason, only, inplace)


def _set_trainable(
    caller: str, model: keras.layers.Layer, trainable: bool, reason: Callable[[keras.layers.Layer, Found], str | None],
    only: Selection | None, inplace: bool,
) -> Result[Report]:  # fmt: skip
    """Set `trainable` of the chosen layers for which there is no reason to leave them."""
    select(caller, check_model(caller, model), only)  # fail before anything is copied
    notes = not_compiled(model)
    if not inplace:
        model = copied(caller, model, advice=IN_PLACE).model
    elif notes:
        notes = ("the model was compiled: call compile() again before you train it",)
    changed, left, layers = [], [], []
    for found in select(caller, check_model(caller, model), only):
        was, why = describe(found.module), reason(model, found)
        if why is not None:
            left.append(Change.unchanged(found.path, was, why))
            continue
        layers.append(found.module)
        changed.append(Change(found.path, *((f"frozen {was}", was) if trainable else (was, f"frozen {was}"))))
    result = Result(model, Report(caller, tuple(changed), tuple(left), notes=notes))
    try:
        for layer in layers:
            layer.trainable = trainable
    except BaseException:
        for layer in layers:
            layer.trainable = not trainable
        raise
    return result
