"""How a scale and shift moves past Keras layers and operations that compute one tensor from several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
from keras import layers
from keras.src.ops import numpy as operations

from batchnorm.keras.models.layers import named
from batchnorm.keras.surgery.fold.linear import CannotFold, ScaleShift

Parts = Callable[[Any, ScaleShift, Sequence[Any]], list[ScaleShift]]

_CONCATENATIONS = (layers.Concatenate, operations.Concatenate)


def _of_sum(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[ScaleShift]:
    """The shift goes into the first term."""
    _check_shapes(merge, s, shapes)
    return [s, *[s.unshifted()] * (len(shapes) - 1)]


def _of_each(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[ScaleShift]:
    _check_shapes(merge, s, shapes)
    return [s] * len(shapes)


def _of_extreme(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[ScaleShift]:
    s.check_not_negative(named(merge))
    return _of_each(merge, s, shapes)


def _of_concatenation(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[ScaleShift]:
    if s.axis != merge.axis % len(shapes[0]):
        return [s] * len(shapes)
    ends = list(accumulate(_sizes(merge, s, shapes)))[:-1]
    parts = zip(np.split(s.scale, ends), np.split(s.shift, ends), strict=True)
    return [ScaleShift(scale, shift, s.axis) for scale, shift in parts]


def _check_shapes(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> None:
    if any(len(shape) <= s.axis or shape[s.axis] != len(s.scale) or len(shape) != len(shapes[0]) for shape in shapes):
        raise CannotFold(f"{named(merge)} next to it broadcasts its inputs")


def _sizes(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[int]:
    sizes = [shape[s.axis] for shape in shapes]
    if None in sizes:
        raise CannotFold(f"{named(merge)} next to it has inputs whose number of channels is open")
    return sizes


_PARTS: dict[Any, Parts] = {
    **dict.fromkeys((layers.Add, operations.Add, layers.Subtract, operations.Subtract), _of_sum),
    layers.Average: _of_each,
    **dict.fromkeys((layers.Maximum, operations.Maximum, layers.Minimum, operations.Minimum), _of_extreme),
    **dict.fromkeys(_CONCATENATIONS, _of_concatenation),
}


def parts(merge: Any, s: ScaleShift, shapes: Sequence[Any]) -> list[ScaleShift] | None:
    """Return the scale and shift of each input that equal one of the result; None if nothing is known about the call.

    Args:
        merge: A layer or operation with several inputs and no other arguments.
        s: A scale and shift of its result.
        shapes: The shapes of its inputs.

    Raises:
        CannotFold: It does not commute with the scale and shift.
    """
    rule = _PARTS.get(type(merge))
    return None if rule is None else rule(merge, s, shapes)


def whole(merge: Any, s: ScaleShift, shapes: Sequence[Any], positions: Collection[int]) -> ScaleShift | None:
    """Return the scale and shift of the result that equals one of some inputs; None if there is none.

    Args:
        merge: A layer or operation with several inputs and no other arguments.
        s: A scale and shift of the inputs at the positions; the others have none.
        shapes: The shapes of its inputs.
        positions: The positions of these inputs.

    Raises:
        CannotFold: The number of channels of an input is open.
    """
    if type(merge) not in _CONCATENATIONS or s.axis != merge.axis % len(shapes[0]):
        return None
    sizes = list(enumerate(_sizes(merge, s, shapes)))
    scale = [s.scale if i in positions else np.ones(size) for i, size in sizes]
    shift = [s.shift if i in positions else np.zeros(size) for i, size in sizes]
    return replace(s, scale=np.concatenate(scale), shift=np.concatenate(shift))
