"""How a scale and shift moves through a network: back into what computes its input, or on into what reads its result.

A scale and shift is held as tensors that broadcast against the value it applies to, so that one rule serves reshaping,
flattening and permutation wherever the channels go.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.models.model_graph import Shape
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.states import CannotFold, axis_vector, collapsed

Rule = Callable[[Node, ScaleShift, Shape, Shape], ScaleShift]


def _unchanged(node: Node, s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    if len(given) != len(wanted):
        raise CannotFold(f"{describe(node)} changes the number of dimensions")
    return s


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _max_pool(node: Node, s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    if bool((s.scale < 0).any()):
        raise CannotFold(f"{describe(node)} next to it does not commute with a negative scale")
    return _unchanged(node, s, given, wanted)


def _average_pool(node: Node, s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    padding = _argument(node, 3, "padding", 0)
    padded = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    if s.shifts and padded and _argument(node, 5, "count_include_pad", True):
        raise CannotFold(f"{describe(node)} next to it counts padded zeros")
    if s.shifts and _argument(node, 6, "divisor_override", None) is not None:
        raise CannotFold(f"{describe(node)} next to it has a divisor of its own")
    return _unchanged(node, s, given, wanted)


def _pad(node: Node, s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    mode, value = _argument(node, 2, "mode", "constant"), _argument(node, 3, "value", None)
    if mode == "constant" and (s.shifts or value not in (None, 0, 0.0)):
        raise CannotFold("padding with a constant stands between it and the next layer")
    sizes = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    rank = len(given)
    if not isinstance(sizes, (tuple, list)) or any(s.scale.shape[rank - 1 - i] != 1 for i in range(len(sizes) // 2)):
        raise CannotFold("padding along its channels follows")
    return s


def _permute(node: Node, s: ScaleShift, given: Shape, wanted: Shape, *, back: bool) -> ScaleShift:
    if node.target is torch.transpose:
        first, second = (_argument(node, 1, "dim0", 0), _argument(node, 2, "dim1", 1))
        order = list(range(len(given)))
        order[first], order[second] = order[second], order[first]
    else:
        order = [int(d) % len(given) for d in _argument(node, 1, "dims", ())]
    if back:
        order = [order.index(i) for i in range(len(order))]
    return ScaleShift(s.scale.permute(order), s.shift.permute(order))


def _mean(node: Node, s: ScaleShift, given: Shape, wanted: Shape, *, back: bool) -> ScaleShift:
    dims, keep = _argument(node, 1, "dim", None), _argument(node, 2, "keepdim", False)
    rank = len(wanted if back else given)
    if dims is None or isinstance(dims, Node):
        raise CannotFold("a mean over everything is next to it")
    axes = sorted(d % rank for d in (dims if isinstance(dims, (tuple, list)) else (dims,)))
    return averaged(s, axes, keep=keep, back=back)


def averaged(s: ScaleShift, axes: Sequence[int], *, keep: bool, back: bool) -> ScaleShift:
    """The other side of a mean over these axes, in ascending order.

    Raises:
        CannotFold: It is over the channels.
    """
    scale, shift = s.scale, s.shift
    if back and not keep:
        for axis in axes:
            scale, shift = scale.unsqueeze(axis), shift.unsqueeze(axis)
    if any(scale.shape[axis] != 1 for axis in axes):
        raise CannotFold("a mean over its channels is next to it")
    if not back and not keep:
        for axis in reversed(axes):
            scale, shift = scale.squeeze(axis), shift.squeeze(axis)
    return ScaleShift(scale, shift)


def _groups(given: Shape, wanted: Shape) -> list[tuple[range, range]]:
    """The axes that a reshape makes of one another: the smallest runs with the same product for every input."""

    def times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(x * y for x, y in zip(a, b, strict=True))

    runs = len((given or wanted)[0])
    one = (1,) * runs
    found, i, j = [], 0, 0
    while i < len(given) or j < len(wanted):
        first_i, first_j = i, j
        left = right = one
        if i < len(given):
            left, i = times(left, given[i]), i + 1
        if j < len(wanted):
            right, j = times(right, wanted[j]), j + 1
        while left != right:
            behind = sum(left) < sum(right)
            if behind and i < len(given):
                left, i = times(left, given[i]), i + 1
            elif not behind and j < len(wanted):
                right, j = times(right, wanted[j]), j + 1
            elif i < len(given):
                left, i = times(left, given[i]), i + 1
            elif j < len(wanted):
                right, j = times(right, wanted[j]), j + 1
            else:
                raise CannotFold("a reshape next to it cannot be followed")
        found.append((range(first_i, i), range(first_j, j)))
    return found


def _reshape(node: Node, s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    return reshaped(s, given, wanted)


def reshaped(s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    """The other side of a reshape from one shape to another.

    Raises:
        CannotFold: It mixes channels with positions.
    """
    expanded: list[int] = []
    result: list[int] = []
    for from_axes, to_axes in _groups(given, wanted):
        sizes = [s.scale.shape[a] for a in from_axes]
        large_from = [a for a in from_axes if set(given[a]) != {1}]
        large_to = [a for a in to_axes if set(wanted[a]) != {1}]
        if all(n == 1 for n in sizes):
            expanded += sizes
            result += [1] * len(to_axes)
        elif len(large_from) == 1 and len(large_to) == 1:
            expanded += sizes
            result += [s.scale.shape[large_from[0]] if a == large_to[0] else 1 for a in to_axes]
        else:
            if any(len(set(given[a])) != 1 for a in from_axes) or any(len(set(wanted[a])) != 1 for a in to_axes):
                raise CannotFold("a reshape next to it mixes its channels with positions whose number is open")
            expanded += [given[a][0] for a in from_axes]
            result += [wanted[a][0] for a in to_axes]
    return ScaleShift(*collapsed([t.expand(expanded).reshape(result) for t in (s.scale, s.shift)]))


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


_SAME_BOTH_WAYS: dict[Any, Rule] = {
    **dict.fromkeys((torch.max_pool1d, torch.max_pool2d, torch.max_pool3d), _max_pool),
    **dict.fromkeys((torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d), _average_pool),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), _unchanged),
    **dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d), _max_pool),
    **dict.fromkeys(_interpolations(), _unchanged),
    F.pad: _pad,
    **dict.fromkeys((torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze), _reshape),
}
_DIRECTED: dict[Any, Callable[..., ScaleShift]] = {
    torch.permute: _permute,
    torch.transpose: _permute,
    torch.mean: _mean,
}


def passes(node: Node) -> bool:
    """Whether the call lets a scale and shift through at all: one tensor in, one out, positions aside the same."""
    return node.op == "call_function" and (node.target in _SAME_BOTH_WAYS or node.target in _DIRECTED)


def through(node: Node, s: ScaleShift, given: Shape, wanted: Shape, *, back: bool) -> ScaleShift:
    """The scale and shift that, on the other side of the call, does what `s` does on this one.

    Args:
        node: A call that `passes`.
        s: On its result if `back`, else on its input.
        given: The shape of what s applies to.
        wanted: That of what the returned one applies to.
        back: From the result to the input.

    Raises:
        CannotFold: The two do not commute.
    """
    if node.target in _DIRECTED:
        return _DIRECTED[node.target](node, s, given, wanted, back=back)
    return _SAME_BOTH_WAYS[node.target](node, s, given, wanted)


def channel_vector(s: ScaleShift, axis: int, size: int) -> ScaleShift:
    """`[size]` along one axis.

    Raises:
        CannotFold: It varies along another axis.
    """
    return ScaleShift(axis_vector(s.scale, axis, size), axis_vector(s.shift, axis, size))


def broadcast(s: ScaleShift, axis: int, rank: int) -> ScaleShift:
    """The vector as tensors of this rank."""
    shape = [-1 if i == axis else 1 for i in range(rank)]
    return ScaleShift(s.scale.reshape(shape), s.shift.reshape(shape))


def part_of_concatenation(s: ScaleShift, axis: int, sizes: Sequence[int]) -> list[ScaleShift]:
    """What each input of a concatenation along `axis` gets of what applies to the result."""
    if s.scale.shape[axis] == 1:
        return [s] * len(sizes)
    return s.split(sizes, axis)


def within_concatenation(s: ScaleShift, axis: int, sizes: Sequence[int], position: int) -> ScaleShift:
    """What applies to the result where one input gets `s` and the others stay."""

    def placed(values: Tensor, other: float) -> Tensor:
        shape = list(values.shape)
        parts = []
        for i, size in enumerate(sizes):
            shape[axis] = size
            parts.append(values.expand(shape) if i == position else torch.full(shape, other, dtype=values.dtype))
        return torch.cat(parts, axis)

    return ScaleShift(placed(s.scale, 1.0), placed(s.shift, 0.0))


_NAMES = {operator.add: "an addition", torch.cat: "a concatenation", operator.mul: "a multiplication"}


def describe(node: Node) -> str:
    """The call in words."""
    if node.op == "placeholder":
        return "the network's input"
    if node.op == "output":
        return "the network's output"
    if node.target in _NAMES:
        return _NAMES[node.target]
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    if node.op == "call_module":
        return f"the layer {target} ({type(node.graph.owning_module.get_submodule(str(target))).__name__})"  # type: ignore[union-attr]
    return str(getattr(target, "__name__", target))
