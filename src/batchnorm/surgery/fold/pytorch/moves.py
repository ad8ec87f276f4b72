"""The functions of PyTorch that a scale and shift can pass, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import Move
from batchnorm.surgery.fold.states import CannotFold


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _unchanged(node: Node, move: Move) -> ScaleShift:
    return moves.unchanged(move)


def _max_pool(node: Node, move: Move) -> ScaleShift:
    moves.max_pooled(move.s, _name(node))
    return moves.unchanged(move)


def _average_pool(node: Node, move: Move) -> ScaleShift:
    padding = _argument(node, 3, "padding", 0)
    is_padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    counts_padding = is_padded and bool(_argument(node, 5, "count_include_pad", True))
    moves.average_pooled(move.s, _name(node), counts_padding=counts_padding)
    if move.s.shifts and _argument(node, 6, "divisor_override", None) is not None:
        raise CannotFold(f"{_name(node)} next to it has its own divisor")
    return moves.unchanged(move)


def _pad(node: Node, move: Move) -> ScaleShift:
    constant = _argument(node, 2, "mode", "constant") == "constant"
    moves.padded(move.s, constant=constant, zero=_argument(node, 3, "value", None) in (None, 0, 0.0))
    sizes = _argument(node, 1, "pad", None)
    if not isinstance(sizes, (tuple, list)):
        raise CannotFold("padding next to it has computed sizes")
    return moves.positions_only(move.s, [-1 - i for i in range(len(sizes) // 2)], "padding")


def _permute(node: Node, move: Move) -> ScaleShift:
    axes = torch.empty(tuple(range(1, len(move.given) + 1)), device="meta")  # each axis has its number as its size
    order = [size - 1 for size in node.target(axes, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    return moves.permuted(move.s, order, back=move.back)


def _mean(node: Node, move: Move) -> ScaleShift:
    axes = _argument(node, 1, "dim", None)
    if axes is None or isinstance(axes, Node):
        raise CannotFold("a mean over everything is next to it")
    rank = len(move.wanted if move.back else move.given)
    axes = sorted(axis % rank for axis in (axes if isinstance(axes, (tuple, list)) else (axes,)))
    return moves.averaged(move.s, axes, keep=_argument(node, 2, "keepdim", False), back=move.back)


def _reshape(node: Node, move: Move) -> ScaleShift:
    return moves.reshaped(move.s, move.given, move.wanted)


def _interpolations() -> set[Any]:
    nearest = ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d")
    linear = ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
    packets = [getattr(torch.ops.aten, name, None) for name in (*nearest, *linear)]
    return {p.vec for p in packets if p is not None and "vec" in p.overloads()} | {F.interpolate}


RULES: dict[Any, Callable[[Node, Move], ScaleShift]] = {
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), _max_pool),
    **dict.fromkeys((torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _average_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _unchanged),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _max_pool),
    **dict.fromkeys(_interpolations(), _unchanged),
    F.pad: _pad,
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze), _reshape),
    **dict.fromkeys((torch.permute, torch.transpose, torch.movedim), _permute),
    torch.mean: _mean,
}
