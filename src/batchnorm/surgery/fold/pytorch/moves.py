"""The functions of PyTorch that a scale and shift can pass, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Shape
from batchnorm.surgery.fold.states import CannotFold


class Move(NamedTuple):
    """A scale and shift that is to pass a call.

    Attributes:
        call: The call.
        s: The scale and shift.
        given: The shape of the tensor that s applies to.
        wanted: The shape of the tensor at the other side of the call.
        back: Whether s applies to the call's result.
    """

    call: Node
    s: ScaleShift
    given: Shape
    wanted: Shape
    back: bool

    @property
    def name(self) -> str:
        """The name of the function."""
        return str(getattr(self.call.target, "__name__", self.call.target))

    def argument(self, position: int, name: str, default: Any) -> Any:
        """Return an argument of the call."""
        return self.call.args[position] if len(self.call.args) > position else self.call.kwargs.get(name, default)


def _same_rank(move: Move) -> ScaleShift:
    if len(move.given) != len(move.wanted):
        raise CannotFold(f"{move.name} changes the number of dimensions")
    return move.s


def _max_pool(move: Move) -> ScaleShift:
    moves.max_pooled(move.s, move.name)
    return _same_rank(move)


def _average_pool(move: Move) -> ScaleShift:
    padding = move.argument(3, "padding", 0)
    is_padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    counts_padding = is_padded and bool(move.argument(5, "count_include_pad", True))
    moves.average_pooled(move.s, move.name, counts_padding=counts_padding)
    if move.s.shifts and move.argument(6, "divisor_override", None) is not None:
        raise CannotFold(f"{move.name} next to it has its own divisor")
    return _same_rank(move)


def _pad(move: Move) -> ScaleShift:
    constant = move.argument(2, "mode", "constant") == "constant"
    moves.padded(move.s, constant=constant, zero=move.argument(3, "value", None) in (None, 0, 0.0))
    sizes = move.argument(1, "pad", None)
    if not isinstance(sizes, (tuple, list)):
        raise CannotFold("padding next to it has computed sizes")
    return moves.positions_only(move.s, [-1 - i for i in range(len(sizes) // 2)], "padding")


def _permute(move: Move) -> ScaleShift:
    order = list(range(len(move.given)))
    if move.call.target is torch.transpose:
        first, second = move.argument(1, "dim0", 0), move.argument(2, "dim1", 1)
        order[first], order[second] = order[second], order[first]
    else:
        order = [int(axis) % len(order) for axis in move.argument(1, "dims", ())]
    return moves.permuted(move.s, order, back=move.back)


def _mean(move: Move) -> ScaleShift:
    axes = move.argument(1, "dim", None)
    if axes is None or isinstance(axes, Node):
        raise CannotFold("a mean over everything is next to it")
    rank = len(move.wanted if move.back else move.given)
    axes = sorted(axis % rank for axis in (axes if isinstance(axes, (tuple, list)) else (axes,)))
    return moves.averaged(move.s, axes, keep=move.argument(2, "keepdim", False), back=move.back)


def _reshape(move: Move) -> ScaleShift:
    return moves.reshaped(move.s, move.given, move.wanted)


def _interpolations() -> set[Any]:
    names = (
        "nearest1d",
        "nearest2d",
        "nearest3d",
        "_nearest_exact2d",
        "linear1d",
        "bilinear2d",
        "trilinear3d",
        "bicubic2d",
    )
    packets = [getattr(torch.ops.aten, f"upsample_{n}".replace("upsample__", "_upsample_"), None) for n in names]
    return {p.vec for p in packets if p is not None and "vec" in p.overloads()} | {F.interpolate}


RULES: dict[Any, Callable[[Move], ScaleShift]] = {
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), _max_pool),
    **dict.fromkeys((torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _average_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _same_rank),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _max_pool),
    **dict.fromkeys(_interpolations(), _same_rank),
    F.pad: _pad,
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze), _reshape),
    **dict.fromkeys((torch.permute, torch.transpose), _permute),
    torch.mean: _mean,
}
