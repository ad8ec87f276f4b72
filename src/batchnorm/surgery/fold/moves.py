"""How a scale and shift moves past an operation, for any kind of graph.

A scale and shift is stored as tensors that broadcast against the value it applies to. One rule therefore covers
reshaping, flattening and permutation, whatever the axis of the channels. Every function raises `CannotFold` if the
operation and the scale and shift do not commute.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.states import CannotFold

Shape = tuple[tuple[int, ...], ...]  # for each axis, its size in each run


class Move(NamedTuple):
    """A scale and shift at one side of a call.

    Attributes:
        s: The scale and shift.
        given: The shape of the tensor that it applies to.
        wanted: The shape of the tensor at the other side.
        back: Whether it applies to the call's result.
    """

    s: ScaleShift
    given: Shape
    wanted: Shape
    back: bool


Rule = Callable[[Move], ScaleShift]  # the equivalent at the other side; raises CannotFold if there is none


def unchanged(move: Move) -> ScaleShift:
    """Return the same scale and shift, for a call that keeps the rank."""
    if len(move.given) != len(move.wanted):
        raise CannotFold("the operation next to it changes the number of dimensions")
    return move.s


def max_pooled(s: ScaleShift, pool: str) -> ScaleShift:
    """Move the scale and shift past max-pooling."""
    if bool((s.scale < 0).any()):
        raise CannotFold(f"{pool} next to it does not commute with a negative scale")
    return s


def average_pooled(s: ScaleShift, pool: str, *, counts_padding: bool) -> ScaleShift:
    """Move the scale and shift past average-pooling."""
    if s.shifts and counts_padding:
        raise CannotFold(f"{pool} next to it counts padded zeros")
    return s


def padded(s: ScaleShift, *, constant: bool, zero: bool) -> ScaleShift:
    """Move the scale and shift past padding: with a constant, which may be zero, or with values of the tensor."""
    if constant and (s.shifts or not zero):
        raise CannotFold("padding with a constant is between it and the next layer")
    return s


def positions_only(s: ScaleShift, axes: Collection[int], name: str) -> ScaleShift:
    """Move the scale and shift past an operation of this name that changes only these axes."""
    if any(s.scale.shape[axis] != 1 for axis in axes):
        raise CannotFold(f"{name} next to it changes its channels")
    return s


def permuted(s: ScaleShift, order: Sequence[int], *, back: bool) -> ScaleShift:
    """Move the scale and shift past a permutation of the axes to this order."""
    order = [order.index(i) for i in range(len(order))] if back else list(order)
    return ScaleShift(s.scale.permute(order), s.shift.permute(order))


def averaged(s: ScaleShift, axes: Sequence[int], *, keep: bool, back: bool) -> ScaleShift:
    """Move the scale and shift past a mean over these axes, in ascending order."""
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


def _matching_axes(given: Shape, wanted: Shape) -> list[tuple[range, range]]:
    """Return the smallest runs of axes that a reshape maps to each other; their sizes always have equal products."""

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
            if i < len(given) and (sum(left) < sum(right) or j == len(wanted)):
                left, i = times(left, given[i]), i + 1
            elif j < len(wanted):
                right, j = times(right, wanted[j]), j + 1
            else:
                raise CannotFold("a reshape next to it cannot be followed")
        found.append((range(first_i, i), range(first_j, j)))
    return found


def reshaped(s: ScaleShift, given: Shape, wanted: Shape) -> ScaleShift:
    """Move the scale and shift past a reshape from one shape to another."""
    expanded: list[int] = []
    result: list[int] = []
    for from_axes, to_axes in _matching_axes(given, wanted):
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
    return ScaleShift(*_collapsed([t.expand(expanded).reshape(result) for t in (s.scale, s.shift)]))


def _collapsed(values: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with size 1 along every axis that none of them varies along."""
    result = list(values)
    for axis in range(result[0].dim()):
        if all(bool((t == t.narrow(axis, 0, 1)).all()) for t in result):
            result = [t.narrow(axis, 0, 1) for t in result]
    return result


def channel_vector(s: ScaleShift, axis: int, size: int) -> ScaleShift:
    """Return the scale and shift as vectors `[size]` along one axis."""

    def vector(values: Tensor) -> Tensor:
        if values.shape[axis] != values.numel() or values.numel() not in (1, size):
            raise CannotFold("its channels are not the channels of the layer next to it")
        return values.reshape(-1).expand(size)

    return ScaleShift(vector(s.scale), vector(s.shift))


def broadcast(s: ScaleShift, axis: int, rank: int) -> ScaleShift:
    """Return the vectors as tensors of this rank."""
    shape = [-1 if i == axis else 1 for i in range(rank)]
    return ScaleShift(s.scale.reshape(shape), s.shift.reshape(shape))


def part_of_concatenation(s: ScaleShift, axis: int, sizes: Sequence[int]) -> list[ScaleShift]:
    """Return the part for each tensor of a concatenation along `axis`."""
    if s.scale.shape[axis] == 1:
        return [s] * len(sizes)
    return s.split(sizes, axis)


def within_concatenation(s: ScaleShift, axis: int, sizes: Sequence[int], positions: Collection[int]) -> ScaleShift:
    """Return the scale and shift of a concatenation in which `s` applies only to the tensors at these positions."""

    def placed(values: Tensor, other: float) -> Tensor:
        shape = list(values.shape)
        parts = []
        for i, size in enumerate(sizes):
            shape[axis] = size
            parts.append(
                values.expand(shape) if i in positions else torch.full(shape, other, dtype=values.dtype, device="cpu")
            )
        return torch.cat(parts, axis)

    return ScaleShift(placed(s.scale, 1.0), placed(s.shift, 0.0))
