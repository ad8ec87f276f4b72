"""The changes that move one batch normalization back into what computes its input, or on into what reads its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import torch

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import broadcast, channel_vector, part_of_concatenation, within_concatenation
from batchnorm.surgery.fold.network import C, Kind, Network, V
from batchnorm.surgery.fold.states import CannotFold, Linear, NewConstants, Norm, State


@dataclass(eq=False)
class FoldPlan(Generic[V, C]):
    """The changes that remove one batch normalization, or one addition of branches.

    Attributes:
        network: The network before the change.
        states: What calls become.
        gone: Calls that are removed.
        alias: Values that are replaced, each by another.
        through: Other calls whose results change.
        same: Values that must not change.
        where: The calls that take the batch normalization up, for the report.
    """

    network: Network[V, C]
    states: dict[C, State] = field(default_factory=dict)
    gone: list[C] = field(default_factory=list)
    alias: dict[V, V] = field(default_factory=dict)
    through: list[C] = field(default_factory=list)
    same: list[V] = field(default_factory=list)
    where: list[C] = field(default_factory=list)

    def carry_out(self, values: Mapping[V, Any]) -> None:
        """Make the change; `values` are the new values of tensors."""
        network = self.network
        network.states.update(self.states)
        for call in self.gone:
            network.gone.add(call)
            network.states.pop(call, None)
        network.alias.update(self.alias)
        network.values.update(values)
        network.refresh()

    @classmethod
    def back(cls, network: Network[V, C], call: C) -> FoldPlan[V, C]:
        """Return the plan that moves a batch normalization into what computes its input.

        Raises:
            CannotFold: Something there cannot take it up.
        """
        plan, source, result, s = cls._removal(network, call, back=True)
        plan.same.append(result)
        plan._into_result(source, call, s)
        return plan

    @classmethod
    def on(cls, network: Network[V, C], call: C) -> FoldPlan[V, C]:
        """Return the plan that moves a batch normalization into everything that reads its result.

        Raises:
            CannotFold: Something there cannot take it up.
        """
        plan, source, result, s = cls._removal(network, call, back=False)
        if source in network.pinned:
            raise CannotFold("its tensor is changed in place")
        plan._into_readers(result, s)
        return plan

    @classmethod
    def _removal(cls, network: Network[V, C], call: C, *, back: bool) -> tuple[FoldPlan[V, C], V, V, ScaleShift]:
        norm, result = network.norm(call), network.result(call)
        source = network.resolve(norm.source)
        plan = cls(network, gone=[call], alias=dict([network.removal(source, result, back=back)]))
        return plan, source, result, broadcast(norm.scale_shift, 1, len(network.shape(source)))

    def _linear(self, call: C) -> Linear:
        state = self.states.get(call)
        return state if isinstance(state, Linear) else self.network.linear(call)

    def _norm(self, call: C) -> Norm:
        state = self.states.get(call)
        return state if isinstance(state, Norm) else self.network.norm(call)

    def _channels(self, s: ScaleShift, value: V, layer: Linear | Norm, size: int) -> ScaleShift:
        """Return the scale and shift of the value as vectors over the layer's channels."""
        rank = len(self.network.shape(value))
        if isinstance(layer, Norm):
            return channel_vector(s, 1, size)
        if layer.dims and rank != layer.dims + 2:
            raise CannotFold("the convolution next to it has no batch axis")
        return channel_vector(s, 1 if layer.dims else rank - 1, size)

    # Back ----------------------------------------------------------------------------------------------------------

    def _into_result(self, value: V, reader: C, s: ScaleShift) -> None:
        """Apply `s` to the value, for its only reader."""
        network = self.network
        if network.constant(value) is not None:
            self._into_constant(value, reader, s)
            return
        others = [other for other in network.readers(value) if other != reader]
        if others:
            raise CannotFold(f"its input is also read by {network.describe(others[0])}")
        if network.inputs(reader).count(value) != 1:
            raise CannotFold("its input is read twice by one call")
        if value in network.pinned:
            raise CannotFold("its tensor is changed in place")
        call = network.writer(value)
        if call is None:
            raise CannotFold("it follows an input")
        kind = network.kind(call)
        if kind is Kind.LINEAR:
            linear = self._linear(call)
            self.states[call] = linear.after(self._channels(s, value, linear, linear.out_channels))
            self.where.append(call)
        elif kind is Kind.NORM:
            norm = self._norm(call)
            self.states[call] = norm.after(self._channels(s, value, norm, norm.channels))
            self.where.append(call)
        elif kind is Kind.SUM:
            self._into_sum(call, s)
        elif kind is Kind.CONCATENATION:
            self.through.append(call)
            tensors, axis = network.inputs(call), network.axis(call)
            sizes = (
                [network.size(tensor, axis) for tensor in tensors] if s.scale.shape[axis] != 1 else [0] * len(tensors)
            )
            for tensor, part in zip(tensors, part_of_concatenation(s, axis, sizes), strict=True):
                self._into_result(tensor, call, part)
        elif kind is Kind.SPLIT:
            self.through.append(call)
            split = network.split(call)
            parts = {network.resolve(part): position for part, position in split.parts.items()}
            self.same += [part for part in parts if part != value]
            whole = within_concatenation(s, split.axis, split.sizes, [parts[value]])
            self._into_result(network.inputs(call)[0], call, whole)
        elif kind is Kind.TRANSPARENT:
            self.through.append(call)
            self._into_result(network.inputs(call)[0], call, network.through(call, s, back=True))
        else:
            raise CannotFold(f"it follows {network.describe(call)}")

    def _into_sum(self, call: C, s: ScaleShift) -> None:
        network, terms = self.network, self.network.inputs(call)
        if len(terms) != 2:
            raise CannotFold("it follows an addition of a number")
        shape = network.shape(network.result(call))
        if any(network.constant(term) is None and network.shape(term) != shape for term in terms):
            raise CannotFold("it follows an addition that broadcasts")
        self.through.append(call)
        constants_first = sorted(terms, key=lambda term: network.constant(term) is None)
        self._into_result(constants_first[0], call, s)  # the shift goes into one of the two
        self._into_result(constants_first[1], call, ScaleShift(s.scale, torch.zeros_like(s.shift)))

    def _into_constant(self, value: V, reader: C, s: ScaleShift) -> None:
        """Apply `s` to a constant, for this reader only."""
        if reader in self.gone or self.network.inputs(reader).count(value) != 1:
            raise CannotFold("it follows a constant")
        states = (self.states.get(reader), self.network.states.get(reader))
        changed = next((state.values for state in states if isinstance(state, NewConstants)), {})
        old = changed.get(value, self.network.constant(value))
        assert old is not None
        new = old * s.scale + s.shift
        while new.dim() > old.dim() and new.shape[0] == 1:
            new = new.squeeze(0)
        self.states[reader] = NewConstants({**changed, value: new})

    # On ------------------------------------------------------------------------------------------------------------

    def _into_readers(self, value: V, s: ScaleShift) -> None:
        """Let every reader of the value apply `s`, which the value no longer has."""
        readers = self.network.readers(value)
        if not readers:
            raise CannotFold("nothing reads its result")
        if value in self.network.pinned:
            raise CannotFold("its tensor is changed in place")
        for reader in readers:
            self._into_reader(reader, value, s)

    def _into_reader(self, reader: C, value: V, s: ScaleShift) -> None:
        network, kind = self.network, self.network.kind(reader)
        inputs = network.inputs(reader)
        if kind is Kind.OUTPUT:
            raise CannotFold("it is a result of the network")
        if kind is Kind.CONCATENATION:
            self.through.append(reader)
            axis = network.axis(reader)
            sizes = [network.size(tensor, axis) for tensor in inputs]
            positions = [i for i, tensor in enumerate(inputs) if tensor == value]
            self._into_readers(network.result(reader), within_concatenation(s, axis, sizes, positions))
            return
        if inputs.count(value) > 1:
            raise CannotFold(f"{network.describe(reader)} reads its result twice")
        if kind in (Kind.OTHER, Kind.SUM) or inputs[0] != value:
            raise CannotFold(f"{network.describe(reader)} reads its result")
        if kind is Kind.LINEAR:
            linear = self._linear(reader)
            self._take_up(reader, linear.before(self._channels(s, value, linear, linear.in_channels)))
        elif kind is Kind.NORM:
            norm = self._norm(reader)
            self._take_up(reader, norm.before(self._channels(s, value, norm, norm.channels)))
        elif kind is Kind.SPLIT:
            self.through.append(reader)
            split = network.split(reader)
            scales = part_of_concatenation(s, split.axis, split.sizes)
            for part, position in split.parts.items():
                if network.readers(part):
                    self._into_readers(network.resolve(part), scales[position])
        else:
            self.through.append(reader)
            self._into_readers(network.result(reader), network.through(reader, s, back=False))

    def _take_up(self, call: C, state: Linear | Norm) -> None:
        self.where.append(call)
        self.states[call] = state
        if isinstance(state, Linear) and state.bias is not None and not state.takes_bias:
            addition = self._addition_of_constant(call, state)
            if addition is not None:
                call, constant = addition
                self.states[self.where[-1]] = replace(state, bias=None)
                self._into_constant(constant, call, ScaleShift(torch.ones(()).double(), state.bias))
        self.same.append(self.network.result(call))

    def _addition_of_constant(self, call: C, linear: Linear) -> tuple[C, V] | None:
        """Return the only reader of a layer's result and the constant that it adds, which can include a bias."""
        network, result = self.network, self.network.result(call)
        readers = network.readers(result)
        if len(readers) != 1 or network.kind(readers[0]) is not Kind.SUM:
            return None
        constants = [term for term in network.inputs(readers[0]) if network.constant(term) is not None]
        if len(constants) != 1 or network.shape(network.result(readers[0])) != network.shape(result):
            return None
        value = network.constant(constants[0])
        fits = value is not None and (value.dim() == 0 or value.shape[-1] in (1, linear.out_channels))
        return (readers[0], constants[0]) if fits else None
