"""The operators of ONNX that a scale and shift can pass, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import Move
from batchnorm.surgery.fold.onnx.graph import Array, Constants, Operator
from batchnorm.surgery.fold.states import CannotFold


class Arguments(NamedTuple):
    """An operator with its constant inputs.

    Attributes:
        operator: The operator.
        constants: The constants of its graph.
    """

    operator: Operator
    constants: Constants

    def has(self, position: int) -> bool:
        """Return whether this input is given."""
        return len(self.operator.node.input) > position and bool(self.operator.node.input[position])

    def array(self, position: int) -> Array | None:
        """Return an input if it is constant."""
        return self.constants.array(self.operator.node.input[position])

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as str."""
        return self.operator.attribute(name, default)

    def numbers(self, name: str, position: int) -> list[int] | None:
        """Return numbers that are an attribute in older versions and a constant input in newer ones, if given."""
        value = self.attribute(name)
        if value is None and self.has(position):
            value = self.array(position)
            if value is None:
                raise CannotFold(f"{self.operator.op} next to it has computed arguments")
            value = value.reshape(-1)
        return None if value is None else [int(v) for v in value]


def _unchanged(given: Arguments, move: Move) -> ScaleShift:
    return move.s


def _dropout(given: Arguments, move: Move) -> ScaleShift:
    training = given.array(2) if given.has(2) else False
    if training is None or bool(training):
        raise CannotFold("dropout in training mode is next to it")
    return move.s


def _max_pool(given: Arguments, move: Move) -> ScaleShift:
    return moves.max_pooled(move.s, given.operator.op)


def _average_pool(given: Arguments, move: Move) -> ScaleShift:
    same = given.attribute("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    is_padded = same or any(given.attribute("pads", ()))
    counts_padding = is_padded and bool(given.attribute("count_include_pad", 0))
    return moves.average_pooled(move.s, given.operator.op, counts_padding=counts_padding)


def _transpose(given: Arguments, move: Move) -> ScaleShift:
    order = [int(axis) for axis in given.attribute("perm", range(len(move.given))[::-1])]
    return moves.permuted(move.s, order, back=move.back)


def _reduce_mean(given: Arguments, move: Move) -> ScaleShift:
    rank = len(move.wanted if move.back else move.given)
    axes = given.numbers("axes", 1)
    if not axes:
        if given.attribute("noop_with_empty_axes", 0):
            return move.s
        raise CannotFold("a mean over everything is next to it")
    axes = sorted(axis % rank for axis in axes)
    return moves.averaged(move.s, axes, keep=bool(given.attribute("keepdims", 1)), back=move.back)


def _pad(given: Arguments, move: Move) -> ScaleShift:
    sizes, rank = given.numbers("pads", 1), len(move.given)
    if sizes is None or given.has(3):
        raise CannotFold("Pad next to it pads axes that are given as an input")
    filled: Any = given.array(2) if given.has(2) else given.attribute("value", 0.0)
    constant = given.attribute("mode", "constant") == "constant"
    moves.padded(move.s, constant=constant, zero=filled is not None and bool(filled == 0))
    return moves.positions_only(move.s, [axis for axis in range(rank) if any(sizes[axis::rank])], "Pad")


def _resize(given: Arguments, move: Move) -> ScaleShift:
    if given.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise CannotFold(f"{given.operator.op} next to it crops")
    sizes = zip(move.given, move.wanted, strict=True)
    return moves.positions_only(move.s, [axis for axis, (a, b) in enumerate(sizes) if a != b], given.operator.op)


def _reshape(given: Arguments, move: Move) -> ScaleShift:
    return moves.reshaped(move.s, move.given, move.wanted)


RULES: dict[str, Callable[[Arguments, Move], ScaleShift]] = {
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
