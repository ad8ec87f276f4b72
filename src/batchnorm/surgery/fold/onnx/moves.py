"""What lets a scale and shift through, from its result to its input or the other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import averaged, reshaped
from batchnorm.surgery.fold.onnx.network import Call, Network, Shape
from batchnorm.surgery.fold.states import CannotFold


def _numbers(network: Network, call: Call, name: str, position: int) -> list[int] | None:
    """What older versions have as an attribute and newer ones as a constant input; None where it is not given."""
    value = call.attribute(name)
    if value is not None:
        return [int(v) for v in value]
    if len(call.node.input) <= position or not call.node.input[position]:
        return None
    array = network.array(call.node.input[position])
    if array is None:
        raise CannotFold(f"{call.describe()} next to it has computed arguments")
    return [int(v) for v in array.reshape(-1)]


def _unchanged(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    return s


def _dropout(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    if len(call.node.input) > 2 and call.node.input[2]:
        training = network.array(call.node.input[2])
        if training is None or bool(training):
            raise CannotFold("dropout in training mode is next to it")
    return s


def _max_pool(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    if bool((s.scale < 0).any()):
        raise CannotFold(f"{call.op} next to it does not commute with a negative scale")
    return s


def _average_pool(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    same = call.attribute("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER")
    padded = same or any(call.attribute("pads", ()))
    if s.shifts and padded and call.attribute("count_include_pad", 0):
        raise CannotFold("AveragePool next to it counts padded zeros")
    return s


def _transpose(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    order = [int(axis) for axis in call.attribute("perm", range(len(given))[::-1])]
    if back:
        order = [order.index(i) for i in range(len(order))]
    return ScaleShift(s.scale.permute(order), s.shift.permute(order))


def _reduce_mean(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    rank = len(wanted if back else given)
    axes = _numbers(network, call, "axes", 1)
    if not axes:
        if call.attribute("noop_with_empty_axes", 0):
            return s
        raise CannotFold("a mean over everything is next to it")
    axes = sorted(axis % rank for axis in axes)
    return averaged(s, axes, keep=bool(call.attribute("keepdims", 1)), back=back)


def _pad(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    sizes = _numbers(network, call, "pads", 1)
    if sizes is None or (len(call.node.input) > 3 and call.node.input[3]):
        raise CannotFold("Pad next to it pads axes that are given as an input")
    if call.attribute("mode", "constant") == "constant":
        filled: Any = call.attribute("value", 0.0)
        if len(call.node.input) > 2 and call.node.input[2]:
            filled = network.array(call.node.input[2])
        if s.shifts or filled is None or bool(filled != 0):
            raise CannotFold("padding with a constant stands between it and the layer next to it")
    _positions_only(call, s, [any(sizes[axis :: len(given)]) for axis in range(len(given))])
    return s


def _resize(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    if call.attribute("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise CannotFold(f"{call.op} next to it crops")
    _positions_only(call, s, [a != b for a, b in zip(given, wanted, strict=True)])
    return s


def _positions_only(call: Call, s: ScaleShift, changed: list[bool]) -> None:
    if any(change and size != 1 for change, size in zip(changed, s.scale.shape, strict=True)):
        raise CannotFold(f"{call.op} next to it changes its channels")


def _reshaped(network: Network, call: Call, s: ScaleShift, given: Shape, wanted: Shape, back: bool) -> ScaleShift:
    return reshaped(s, given, wanted)


_RULES: dict[str, Callable[[Network, Call, ScaleShift, Shape, Shape, bool], ScaleShift]] = {
    "Identity": _unchanged,
    "Dropout": _dropout,
    **dict.fromkeys(("MaxPool", "GlobalMaxPool"), _max_pool),
    "AveragePool": _average_pool,
    "GlobalAveragePool": _unchanged,
    "Transpose": _transpose,
    "ReduceMean": _reduce_mean,
    "Pad": _pad,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshaped),
}


def passes(call: Call) -> bool:
    """Whether the call lets a scale and shift through at all: one tensor in, one out, positions aside the same."""
    return call.op in _RULES


def through(network: Network, call: Call, s: ScaleShift, *, back: bool) -> ScaleShift:
    """The scale and shift that, on the other side of the call, does what `s` does on this one.

    Args:
        network: The graph.
        call: One that `passes`.
        s: On its result if `back`, else on its input, and of that one's rank.
        back: From the result to the input.

    Raises:
        CannotFold: The two do not commute.
    """
    if len([name for name in call.node.output if name]) != 1:
        raise CannotFold(f"{call.op} next to it has two results")
    ends = (network.shape(call.node.output[0]), network.shape(call.node.input[0]))
    given, wanted = ends if back else ends[::-1]
    return _RULES[call.op](network, call, s, given, wanted, back)
