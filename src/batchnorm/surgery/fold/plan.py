"""Plan one fold: backward into the layer that computes the input, or forward into the layers that read the result."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import Move, broadcast, channel_vector, part_of_concatenation, within_concatenation
from batchnorm.surgery.fold.network import Call, Kind, Network, Value
from batchnorm.surgery.fold.states import CannotFold, Layer, Linear, NewConstants, State


@dataclass(eq=False)
class FoldPlan:
    """The changes that remove one batch normalization, or one addition of branches.

    Attributes:
        network: The network before the change.
        states: The new states of calls.
        gone: The calls that are removed.
        sources: The new input of each call with one input that now reads another value.
        alias: The values that are replaced, each by another.
        through: The other calls whose results change.
        same: The values that must not change.
        absorbers: The calls that absorb the batch normalization, for the report.
        copied: The batch normalizations that the absorbers include, and that stay for their other readers.
    """

    network: Network
    states: dict[Call, State] = field(default_factory=dict)
    gone: list[Call] = field(default_factory=list)
    sources: dict[Call, Value] = field(default_factory=dict)
    alias: dict[Value, Value] = field(default_factory=dict)
    through: list[Call] = field(default_factory=list)
    same: list[Value] = field(default_factory=list)
    absorbers: list[Call] = field(default_factory=list)
    copied: list[Call] = field(default_factory=list)

    def carry_out(self) -> None:
        """Make the change.

        Raises:
            arithmetic.NotRepresentable: A new weight is not finite in its dtype. Nothing is changed.
            CannotFold: The graph has no operators for a new state. Nothing is changed.
        """
        for call, state in self.states.items():
            self.network.check_storable(call, state)
        # A proof draws random values independently. Both networks must compute a copied call's result from its input.
        through = [*self.through, *self.copied]
        self.network.change(self.states, self.gone, self.sources, self.alias, through, self.same)

    @classmethod
    def backward(cls, network: Network, call: Call) -> FoldPlan:
        """Return the plan that moves a batch normalization into the calls that compute its input.

        Raises:
            CannotFold: A call there cannot absorb it.
        """
        plan, s = cls._removal(network, call, back=True)
        plan.same.append(call.results[0])
        plan._into_result(call.inputs[0], call, s)
        return plan

    @classmethod
    def forward(cls, network: Network, call: Call) -> FoldPlan:
        """Return the plan that moves a batch normalization into all calls that read its result.

        Raises:
            CannotFold: A call there cannot absorb it.
        """
        plan, s = cls._removal(network, call, back=False)
        if call.inputs[0] in network.pinned:
            raise CannotFold("its tensor is changed in place")
        plan._into_readers(call.results[0], s)
        return plan

    @classmethod
    def _removal(cls, network: Network, call: Call, *, back: bool) -> tuple[FoldPlan, ScaleShift]:
        source, result = call.inputs[0], call.results[0]
        old, new = network.replacement(source, result, back=back)
        plan = cls(network, gone=[call], alias={old: new})
        return plan, broadcast(network.norm(call).scale_shift, 1, len(network.shape(source)))

    def _layer(self, call: Call) -> Layer:
        state = self.states.get(call)
        return state if isinstance(state, Layer) else self.network.layer(call)

    def _channels(self, s: ScaleShift, value: Value, layer: Layer, size: int) -> ScaleShift:
        """Return the scale and shift of a value as vectors over the channels of the layer next to it."""
        return channel_vector(s, layer.channel_axis(len(self.network.shape(value))), size)

    def _through(self, call: Call, s: ScaleShift, *, back: bool) -> ScaleShift:
        """Return the equivalent of `s` at the other side of a transparent call."""
        ends = (self.network.shape(call.results[0]), self.network.shape(call.inputs[0]))
        given, wanted = ends if back else ends[::-1]
        assert call.rule is not None
        return call.rule(Move(s, given, wanted, back))

    # Backward --------------------------------------------------------------------------------------------------------

    def _into_result(self, value: Value, reader: Call, s: ScaleShift) -> None:
        """Apply `s` to the value, for its only reader."""
        network = self.network
        if network.constant(value) is not None:
            self._into_constant(value, reader, s)
            return
        others = [other for other in network.readers(value) if other is not reader]
        if others:
            raise CannotFold(f"its input is also read by {others[0].description}")
        if reader.inputs.count(value) != 1:
            raise CannotFold("its input is read twice by one call")
        if value in network.pinned:
            raise CannotFold("its tensor is changed in place")
        call = network.writer(value)
        if call is None:
            raise CannotFold("it follows an input")
        if call.kind in (Kind.LINEAR, Kind.NORM):
            layer = self._layer(call)
            self.states[call] = layer.after(self._channels(s, value, layer, layer.out_channels))
            self.absorbers.append(call)
            return
        self.through.append(call)
        if call.kind is Kind.SUM:
            self._into_sum(call, s)
        elif call.kind is Kind.CONCATENATION:
            varies = s.scale.shape[call.axis] != 1
            sizes = [network.size(tensor, call.axis) if varies else 0 for tensor in call.inputs]
            for tensor, part in zip(call.inputs, part_of_concatenation(s, call.axis, sizes), strict=True):
                self._into_result(tensor, call, part)
        elif call.kind is Kind.SPLIT:
            self.same += [part for part in call.results if part not in (value, None)]
            whole = within_concatenation(s, call.axis, call.sizes, [call.results.index(value)])
            self._into_result(call.inputs[0], call, whole)
        elif call.kind is Kind.TRANSPARENT:
            self._into_result(call.inputs[0], call, self._through(call, s, back=True))
        else:
            raise CannotFold(f"it follows {call.description}")

    def _into_sum(self, call: Call, s: ScaleShift) -> None:
        network = self.network
        if len(call.inputs) != 2:
            raise CannotFold("it follows an addition of a number")
        # The shift goes into one of the terms, into a constant if there is one.
        first, second = sorted(call.inputs, key=lambda term: network.constant(term) is None)
        terms = [term for term in (first, second) if network.constant(term) is None]
        if not all(network.same_shape(term, call.results[0]) for term in terms):
            raise CannotFold("it follows an addition that broadcasts")
        self._into_result(first, call, s)
        self._into_result(second, call, ScaleShift(s.scale, torch.zeros_like(s.shift)))

    def _into_constant(self, value: Value, reader: Call, s: ScaleShift) -> None:
        """Apply `s` to a constant, for this reader only."""
        if reader in self.gone or reader.inputs.count(value) != 1:
            raise CannotFold("it follows a constant")
        state = self.states.get(reader, reader.state)
        changed = state.values if isinstance(state, NewConstants) else {}
        old = changed.get(value, self.network.constant(value))
        assert old is not None
        new = old * s.scale + s.shift
        while new.dim() > old.dim() and new.shape[0] == 1:
            new = new.squeeze(0)
        self.states[reader] = NewConstants({**changed, value: new})

    # Forward ---------------------------------------------------------------------------------------------------------

    def _into_readers(self, value: Value, s: ScaleShift) -> None:
        """Let every reader of the value apply `s`, which is no longer part of the value."""
        readers = self.network.readers(value)
        if not readers:
            raise CannotFold("nothing reads its result")
        if value in self.network.pinned:
            raise CannotFold("its tensor is changed in place")
        for reader in readers:
            self._into_reader(reader, value, s)

    def _into_reader(self, reader: Call, value: Value, s: ScaleShift) -> None:
        if reader.kind is Kind.OUTPUT:
            raise CannotFold("it is a result of the network")
        if reader.kind is Kind.CONCATENATION:
            self.through.append(reader)
            sizes = [self.network.size(tensor, reader.axis) for tensor in reader.inputs]
            positions = [i for i, tensor in enumerate(reader.inputs) if tensor == value]
            self._into_readers(reader.results[0], within_concatenation(s, reader.axis, sizes, positions))
            return
        if reader.inputs.count(value) > 1:
            raise CannotFold(f"{reader.description} reads its result twice")
        if value not in reader.inputs[:1]:
            raise CannotFold(f"{reader.description} reads its result")
        if reader.kind in (Kind.LINEAR, Kind.NORM):
            layer = self._layer(reader)
            self._absorb(reader, layer.before(self._channels(s, value, layer, layer.in_channels)))
        elif reader.kind is Kind.SPLIT:
            self.through.append(reader)
            parts = part_of_concatenation(s, reader.axis, reader.sizes)
            for result, part in zip(reader.results, parts, strict=True):
                if self.network.readers(result):
                    self._into_readers(result, part)
        elif reader.kind is Kind.TRANSPARENT:
            self.through.append(reader)
            self._into_readers(reader.results[0], self._through(reader, s, back=False))
        else:
            raise CannotFold(f"{reader.description} reads its result")

    def _absorb(self, call: Call, state: Layer) -> None:
        self.absorbers.append(call)
        self.states[call] = state
        if isinstance(state, Linear) and state.bias is not None and not state.takes_bias:
            addition = self._addition_of_constant(call, state)
            if addition is not None:  # it absorbs the bias, so no second addition is needed
                self.states[call] = replace(state, bias=None)
                call, constant = addition
                self._into_constant(constant, call, ScaleShift(torch.ones((), device="cpu").double(), state.bias))
        self.same.append(call.results[0])

    def _addition_of_constant(self, call: Call, linear: Linear) -> tuple[Call, Value] | None:
        """Return the only reader of a layer's result and the constant that it adds, if that can include a bias."""
        network, result = self.network, call.results[0]
        readers = network.readers(result)
        if len(readers) != 1 or readers[0].kind is not Kind.SUM:
            return None
        others = [term for term in readers[0].inputs if term != result]
        value = network.constant(others[0]) if len(others) == 1 else None
        if value is None or not network.same_shape(readers[0].results[0], result):
            return None
        return (readers[0], others[0]) if (1, *value.shape)[-1] in (1, linear.out_channels) else None
