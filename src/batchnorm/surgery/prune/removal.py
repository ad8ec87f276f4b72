"""The channels that can be removed, and the constants that take their place."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg

from batchnorm.surgery.fold import arithmetic, moves
from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.network import Call, Kind, Value
from batchnorm.surgery.fold.states import CannotFold, Linear, Norm
from batchnorm.surgery.prune.channels import Channels, concatenated, is_pointwise, moved, slopes_of


@dataclass
class Removal:
    """Channels to remove.

    Attributes:
        numbers: The numbers of the channels.
        small: For each batch normalization, the channels whose γ may be taken as zero, booleans `[C]`.
        refused: The reason why channels with a small γ stay, by their number.
        zeroed: For each batch normalization, the removed channels whose γ is taken as zero, booleans `[C]`.
        added: For each layer that mixes channels, what the removed ones add to its result, float64 `[out]`.
        exact: Whether these constants are right at every position.
    """

    numbers: set[int]
    small: Mapping[Call, Tensor]
    refused: dict[int, str] = field(default_factory=dict)
    zeroed: dict[Call, Tensor] = field(default_factory=dict)
    added: dict[Call, Tensor] = field(default_factory=dict)
    exact: bool = True

    def has(self, numbers: Tensor) -> Tensor:
        """Return which of these channels are removed."""
        return torch.isin(numbers, torch.tensor(sorted(self.numbers), dtype=numbers.dtype, device="cpu"))


def removal(channels: Channels, small: Mapping[Call, Tensor], largest: Mapping[int, float], exactly: bool) -> Removal:
    """Return the channels that can be removed if every small γ is taken as zero.

    Args:
        channels: The channels of the network.
        small: For each batch normalization, the channels whose γ may be taken as zero.
        largest: The largest |γ| of the channels with this number.
        exactly: Whether to remove only channels whose constant the next layers can absorb exactly, also at a border of
            padded zeros. Otherwise a layer that pads zeros gets a constant that is exact only inside its borders.
    """
    chosen = {int(n) for call, which in small.items() for n in channels.held[call][which]} - channels.kept.keys()
    found = Removal(chosen, small)
    while True:
        found.zeroed = {call: which & found.has(channels.held[call]) for call, which in small.items()}
        refused = _one_of_each(channels, found, largest)
        states = _Constants(channels, found.zeroed, exactly)
        found.added, found.exact = {}, states.exact
        for call, numbers in channels.mixed.items():
            which, layer, name = found.has(numbers), channels.layers[call], channels.name(call)
            if not which.any() or not isinstance(layer, Linear):
                continue
            state = _vector(states.of(call.inputs[0]), layer)
            constants = torch.where(which, state.shift, 0.0)
            found.added[call], everywhere = _constant(layer, constants)
            found.exact &= everywhere
            refused |= dict.fromkeys(numbers[which & (state.scale != 0)].tolist(), f"their values vary at {name}")
            if not everywhere and (exactly or layer.transposed):
                refused |= dict.fromkeys(numbers[constants != 0].tolist(), f"they are not zero, and {name} pads zeros")
        if not refused:
            return found
        found.numbers -= refused.keys()
        found.refused |= refused


def _one_of_each(channels: Channels, found: Removal, largest: Mapping[int, float]) -> dict[int, str]:
    """Return the channel with the largest γ of each layer that would lose all of them."""
    return {
        max(numbers.tolist(), key=lambda number: largest.get(number, 0.0)): "a layer keeps at least one channel"
        for numbers in channels.held.values()
        if bool(found.has(numbers).all())
    }


def _vector(s: ScaleShift, layer: Any) -> ScaleShift:
    return moves.channel_vector(s, layer.channel_axis(s.scale.dim()), layer.in_channels)


def _constant(layer: Linear, constants: Tensor) -> tuple[Tensor, bool]:
    """Return what constant channels add to the layer's result inside its borders, and whether also at its borders."""
    moved = layer.before(ScaleShift(torch.ones_like(constants), constants))
    bias = torch.zeros(layer.out_channels, device="cpu").double() if layer.bias is None else layer.bias
    if moved.border is None:
        return (bias if moved.bias is None else moved.bias) - bias, True
    return arithmetic.interior(moved.border.transpose(0, 1) if layer.transposed else moved.border), False


class _Constants:
    """The constant channels of each value: scale 0, and the constant as shift. Others have scale 1 and shift 0.

    Attributes:
        exact: Whether every constant is right at every position.
    """

    def __init__(self, channels: Channels, zeroed: Mapping[Call, Tensor], exactly: bool) -> None:
        self.exact = True
        self._channels, self._network, self._zeroed, self._exactly = channels, channels.network, zeroed, exactly
        self._states: dict[Value, ScaleShift] = {}
        for call in self._network.calls:
            try:
                results = self._results(call)
            except CannotFold:
                continue
            self._states |= {value: s for value, s in zip(call.results, results, strict=False) if value is not None}

    def of(self, value: Value) -> ScaleShift:
        """Return the constant channels of a value."""
        if value in self._states:
            return self._states[value]
        ones = (1,) * len(self._network.shapes.get(value, ()))
        return ScaleShift(torch.ones(ones, device="cpu").double(), torch.zeros(ones, device="cpu").double())

    def _results(self, call: Call) -> list[ScaleShift]:
        if is_pointwise(call.node):
            return [self._pointwise(call)]
        if call.kind is Kind.CONCATENATION:
            sizes = [self._network.size(value, call.axis) for value in call.inputs]
            parts = [self.of(value) for value in call.inputs]
            pairs = ([s.scale for s in parts], [s.shift for s in parts])
            return [ScaleShift(*(concatenated(tensors, call.axis, sizes) for tensors in pairs))]
        if call.kind is Kind.SPLIT:
            return [self.of(call.inputs[0])] * len(call.results)
        if call.kind is Kind.TRANSPARENT:
            return [self._moved(call, self.of(call.inputs[0]))]
        if call in self._channels.held and call not in self._channels.mixed:
            layer, s = self._channels.layers[call], self.of(call.inputs[0])
            if isinstance(layer, Linear):
                result = self._depthwise(layer, _vector(s, layer))
            else:
                result = self._normalized(call, layer, _vector(s, layer))
            return [moves.broadcast(result, layer.channel_axis(s.scale.dim()), s.scale.dim())]
        return []

    def _normalized(self, call: Call, layer: Norm, s: ScaleShift) -> ScaleShift:
        zeroed, beta = self._zeroed.get(call, torch.tensor(False, device="cpu")), call.node.args[4]
        at_zero = (
            torch.zeros((), device="cpu").double() if beta is None else arithmetic.wide(self._network.attribute(beta))
        )
        values = layer.scale_shift.scale * s.shift + layer.scale_shift.shift
        return _constant_where((s.scale == 0) | zeroed, torch.where(zeroed, at_zero, values))

    def _depthwise(self, layer: Linear, s: ScaleShift) -> ScaleShift:
        added, everywhere = _constant(layer, s.shift)
        constant = s.scale == 0
        if not everywhere:
            if self._exactly or layer.transposed:
                constant = constant & (s.shift == 0)
            else:
                self.exact = False
        each = layer.out_channels // layer.in_channels
        return _constant_where(constant.repeat_interleave(each), added if layer.bias is None else added + layer.bias)

    def _pointwise(self, call: Call) -> ScaleShift:
        node, slopes = call.node, slopes_of(call.node)

        def constants(value: Any) -> Tensor:
            shift = self.of(value).shift
            return shift if slopes is None else shift.expand(1, max(shift.shape[1], slopes.numel()), *shift.shape[2:])

        args, kwargs = map_arg((node.args, node.kwargs), constants)
        layer = node.target if node.op == "call_function" else self._network.trace.module.get_submodule(node.target)
        function = copy.deepcopy(layer).to("cpu", torch.float64) if isinstance(layer, nn.Module) else layer
        inputs = [self.of(value) for value in call.inputs]
        constant = reduce(and_, (s.scale == 0 for s in inputs))
        if node.target is operator.mul:
            constant = constant | reduce(or_, ((s.scale == 0) & (s.shift == 0) for s in inputs))
        with torch.no_grad():
            return _constant_where(*torch.broadcast_tensors(constant, function(*args, **kwargs)))

    def _moved(self, call: Call, s: ScaleShift) -> ScaleShift:
        try:
            return moved(self._network, call, s)
        except CannotFold:  # it keeps only zeros
            return moved(self._network, call, _constant_where((s.scale == 0) & (s.shift == 0), s.shift))


def _constant_where(constant: Tensor, values: Tensor) -> ScaleShift:
    """Return constant channels with these values, for the channels that are `constant` and finite."""
    constant = constant & values.isfinite()
    return ScaleShift((~constant).double(), torch.where(constant, values, 0.0))
