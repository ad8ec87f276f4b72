"""How a scale and shift moves past Keras layers that do not absorb it, in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from keras import activations, layers

from batchnorm.keras.models.layers import channel_axis, named
from batchnorm.keras.surgery.fold.linear import CannotFold, ScaleShift

Move = Callable[[Any, ScaleShift, Any, bool], ScaleShift]


def _unchanged(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    return s


def _activation(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    if layer.activation is not activations.linear:
        raise CannotFold(f"{named(layer)} is next to it")
    return s


def _by_position(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    """Move past a layer that changes positions only."""
    if s.axis != channel_axis(layer, len(shape)):
        raise CannotFold(f"{named(layer)} next to it changes its channels")
    return s


def _max_pool(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    s.check_not_negative(named(layer))
    return _by_position(layer, s, shape, back)


def _average_pool(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    # Whether padding counts depends on the backend.
    if s.shifts and layer.padding != "valid":
        raise CannotFold(f"{named(layer)} next to it pads")
    return _by_position(layer, s, shape, back)


def _padding(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    if s.shifts:
        raise CannotFold(f"{named(layer)} next to it pads with zeros")
    return _by_position(layer, s, shape, back)


def _global_pool(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    channels = channel_axis(layer, len(shape))
    result = channels if layer.keepdims else 1
    given, wanted = (result, channels) if back else (channels, result)
    if s.axis != given:
        raise CannotFold(f"{named(layer)} next to it changes its channels")
    return replace(s, axis=wanted)


def _global_max_pool(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    s.check_not_negative(named(layer))
    return _global_pool(layer, s, shape, back)


def _flatten(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    if back or any(size is None for size in shape[1:]):
        raise CannotFold(f"{named(layer)} next to it mixes its channels with positions")
    sizes = [len(s.scale) if axis == s.axis else 1 for axis in range(1, len(shape))]
    order = list(range(len(sizes)))
    if layer.data_format == "channels_first":  # flattened in the order of channels last
        order = [*order[1:], 0]

    def flat(values: Any) -> Any:
        return np.broadcast_to(values.reshape(sizes), shape[1:]).transpose(*order).reshape(-1)

    return ScaleShift(flat(s.scale), flat(s.shift), 1)


def _permute(layer: Any, s: ScaleShift, shape: Any, back: bool) -> ScaleShift:
    order = [0, *layer.dims]
    return replace(s, axis=order[s.axis] if back else order.index(s.axis))


def _for_ranks(kind: str, ranks: str = "123") -> list[Any]:
    return [getattr(layers, f"{kind}{rank}D") for rank in ranks]


MOVES: dict[Any, Move] = {
    layers.Activation: _activation,
    layers.Flatten: _flatten,
    layers.Permute: _permute,
    **dict.fromkeys(
        (
            layers.Identity,
            layers.Dropout,
            layers.GaussianDropout,
            layers.GaussianNoise,
            layers.AlphaDropout,
            layers.ActivityRegularization,
            *_for_ranks("SpatialDropout"),
        ),
        _unchanged,
    ),
    **dict.fromkeys(_for_ranks("MaxPooling"), _max_pool),
    **dict.fromkeys(_for_ranks("AveragePooling"), _average_pool),
    **dict.fromkeys(_for_ranks("GlobalMaxPooling"), _global_max_pool),
    **dict.fromkeys(_for_ranks("GlobalAveragePooling"), _global_pool),
    **dict.fromkeys(_for_ranks("ZeroPadding"), _padding),
    **dict.fromkeys([*_for_ranks("Cropping"), *_for_ranks("UpSampling")], _by_position),
}


def move(layer: Any, s: ScaleShift, shape: Any, *, back: bool) -> ScaleShift | None:
    """Return the equivalent scale and shift at the other side of a layer; None if nothing is known about the layer.

    Args:
        layer: A layer with one input.
        s: A scale and shift of its input, or with `back` of its result.
        shape: The shape of its input.
        back: Whether `s` applies to the result.

    Raises:
        CannotFold: The layer does not commute with it.
    """
    rule = MOVES.get(type(layer))
    return None if rule is None else rule(layer, s, shape, back)
