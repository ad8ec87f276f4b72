"""The operators of ONNX that a scale and shift can pass, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Shape
from batchnorm.surgery.fold.onnx.graph import Array, Call, Constants
from batchnorm.surgery.fold.states import CannotFold


class Move(NamedTuple):
    """A scale and shift that is to pass a call.

    Attributes:
        call: The call.
        constants: The constants of its graph.
        s: The scale and shift.
        given: The shape of the tensor that s applies to.
        wanted: The shape of the tensor at the other side of the call.
        back: Whether s applies to the call's result.
    """

    call: Call
    constants: Constants
    s: ScaleShift
    given: Shape
    wanted: Shape
    back: bool

    def has(self, position: int) -> bool:
        """Whether the call has this input."""
        return len(self.call.node.input) > position and bool(self.call.node.input[position])

    def array(self, position: int) -> Array | None:
        """Return an input if it is constant."""
        return self.constants.array(self.call.node.input[position])

    def numbers(self, name: str, position: int) -> list[int] | None:
        """Return what older versions give as an attribute and newer ones as a constant input; None if not given."""
        value = self.call.attribute(name)
        if value is None and self.has(position):
            value = self.array(position)
            if value is None:
                raise CannotFold(f"{self.call.op} next to it has computed arguments")
            value = value.reshape(-1)
        return None if value is None else [int(v) for v in value]


def _unchanged(move: Move) -> ScaleShift:
    return move.s


def _dropout(move: Move) -> ScaleShift:
    training = move.array(2) if move.has(2) else False
    if training is None or bool(training):
        raise CannotFold("dropout in training mode is next to it")
    return move.s


def _max_pool(move: Move) -> ScaleShift:
    return moves.max_pooled(move.s, move.call.op)


def _average_pool(move: Move) -> ScaleShift:
    same = move.call.attribute("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    is_padded = same or any(move.call.attribute("pads", ()))
    counts_padding = is_padded and bool(move.call.attribute("count_include_pad", 0))
    return moves.average_pooled(move.s, move.call.op, counts_padding=counts_padding)


def _transpose(move: Move) -> ScaleShift:
    order = [int(axis) for axis in move.call.attribute("perm", range(len(move.given))[::-1])]
    return moves.permuted(move.s, order, back=move.back)


def _reduce_mean(move: Move) -> ScaleShift:
    rank = len(move.wanted if move.back else move.given)
    axes = move.numbers("axes", 1)
    if not axes:
        if move.call.attribute("noop_with_empty_axes", 0):
            return move.s
        raise CannotFold("a mean over everything is next to it")
    axes = sorted(axis % rank for axis in axes)
    return moves.averaged(move.s, axes, keep=bool(move.call.attribute("keepdims", 1)), back=move.back)


def _pad(move: Move) -> ScaleShift:
    sizes, rank = move.numbers("pads", 1), len(move.given)
    if sizes is None or move.has(3):
        raise CannotFold("Pad next to it pads axes that are given as an input")
    filled: Any = move.array(2) if move.has(2) else move.call.attribute("value", 0.0)
    constant = move.call.attribute("mode", "constant") == "constant"
    moves.padded(move.s, constant=constant, zero=filled is not None and bool(filled == 0))
    return moves.positions_only(move.s, [axis for axis in range(rank) if any(sizes[axis::rank])], "Pad")


def _resize(move: Move) -> ScaleShift:
    if move.call.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise CannotFold(f"{move.call.op} next to it crops")
    sizes = zip(move.given, move.wanted, strict=True)
    return moves.positions_only(move.s, [axis for axis, (a, b) in enumerate(sizes) if a != b], move.call.op)


def _reshape(move: Move) -> ScaleShift:
    return moves.reshaped(move.s, move.given, move.wanted)


RULES: dict[str, Callable[[Move], ScaleShift]] = {
    "Identity": _unchanged,
    "Dropout": _dropout,
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), _max_pool),
    "AveragePool": _average_pool,
    "GlobalAveragePool": _unchanged,
    "Transpose": _transpose,
    "ReduceMean": _reduce_mean,
    "Pad": _pad,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
}
