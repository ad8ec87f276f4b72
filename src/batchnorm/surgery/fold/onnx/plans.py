"""Where one batch normalization can go: every call that would change, or the reason why none may."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from batchnorm.surgery.fold.arithmetic import ScaleShift
from batchnorm.surgery.fold.moves import broadcast, channel_vector, part_of_concatenation, within_concatenation
from batchnorm.surgery.fold.onnx import moves
from batchnorm.surgery.fold.onnx.network import Array, Call, Network
from batchnorm.surgery.fold.onnx.states import LINEAR, Added, Linear, Norm, State
from batchnorm.surgery.fold.states import CannotFold


@dataclass(eq=False)
class Plan:
    """What folding one batch normalization changes.

    Attributes:
        network: As it is before.
        states: What the changed calls become.
        gone: Calls that are not made any more.
        alias: Names that become one: the first is called by the second.
        through: Calls whose results change, or that only pass something on.
        same: Tensors that must be what they were.
        where: What takes it up, for the report.
    """

    network: Network
    states: dict[Call, State] = field(default_factory=dict)
    gone: list[Call] = field(default_factory=list)
    alias: dict[str, str] = field(default_factory=dict)
    through: list[Call] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    where: list[Call] = field(default_factory=list)

    def carry_out(self, values: dict[str, Array]) -> None:
        """Make the change; `values` are those of the tensors that it touches."""
        network = self.network
        network.states.update(self.states)
        for call in self.gone:
            network.gone.add(call)
            network.states.pop(call, None)
        network.alias.update(self.alias)
        network.values.update(values)
        network.refresh()

    @classmethod
    def back(cls, network: Network, call: Call) -> Plan:
        """Into what computes its input.

        Raises:
            CannotFold: There is something that cannot take it up.
        """
        plan, norm = cls(network), norm_of(network, call)
        source, output = network.resolve(norm.source), network.resolve(call.node.output[0])
        plan._into_result(source, call, broadcast(norm.scale_shift, 1, len(network.shape(source))))
        plan.gone.append(call)
        plan.alias[source] = output
        plan.same.append(output)
        return plan

    @classmethod
    def on(cls, network: Network, call: Call) -> Plan:
        """Into everything that reads its result.

        Raises:
            CannotFold: There is something that cannot take it up.
        """
        plan, norm = cls(network), norm_of(network, call)
        source, output = network.resolve(norm.source), network.resolve(call.node.output[0])
        plan.gone.append(call)
        plan.alias[output] = source
        plan._into_readers(output, broadcast(norm.scale_shift, 1, len(network.shape(source))))
        return plan

    # Back ----------------------------------------------------------------------------------------------------------

    def _into_result(self, name: str, reader: Call, s: ScaleShift) -> None:
        """Make the tensor `s` of what it was, for its only reader."""
        network = self.network
        readers = network.readers(name)
        if readers != [reader] or not network.reads_once(reader, name):
            others = [other.describe() for other in readers if other is not reader]
            raise CannotFold(
                f"its input is also read by {others[0]}" if others else "its input is read twice by one call"
            )
        call = network.writer(name)
        if call is None:
            raise CannotFold("it follows " + ("a constant" if network.tensor(name) is not None else "an input"))
        if is_linear(network, call):
            linear = linear_of(network, call)
            axis = linear.axis % len(network.shape(name))
            self.states[call] = linear.after(channel_vector(s, axis, linear.out_channels))
            self.where.append(call)
        elif call.op == "BatchNormalization":
            norm = norm_of(network, call)
            self.states[call] = norm.then(channel_vector(s, 1, norm.scale_shift.scale.numel()))
            self.where.append(call)
        elif call.op == "Concat":
            axis = call.attribute("axis") % len(network.shape(name))
            self.through.append(call)
            sizes = [network.size(each, axis) for each in call.node.input] if s.scale.shape[axis] != 1 else []
            parts = part_of_concatenation(s, axis, sizes) if sizes else [s] * len(call.node.input)
            for each, part in zip(call.node.input, parts, strict=True):
                self._into_result(network.resolve(each), call, part)
        elif call.op == "Add":
            self._into_sum(call, s)
        elif moves.passes(call):
            self.through.append(call)
            self._into_result(network.resolve(call.node.input[0]), call, moves.through(network, call, s, back=True))
        else:
            raise CannotFold(f"it follows {call.describe()}")

    def _into_sum(self, call: Call, s: ScaleShift) -> None:
        network, without = self.network, ScaleShift(s.scale, torch.zeros_like(s.shift))
        shape = network.shape(call.node.output[0])
        added = added_to(network, call)
        terms = list(call.node.input) if added is None else [added.source]
        if any(network.shape(term) != shape for term in terms):
            raise CannotFold("it follows an addition that broadcasts")
        if added is None:
            self.through.append(call)
        else:
            self.states[call] = added.then(s)
        for i, term in enumerate(terms):  # the shift goes into one of the two, or into the constant
            self._into_result(network.resolve(term), call, s if i == 0 and added is None else without)

    # On ------------------------------------------------------------------------------------------------------------

    def _into_readers(self, name: str, s: ScaleShift) -> None:
        """Let every reader of the tensor take up `s`, which its values no longer have."""
        readers = self.network.readers(name)
        if not readers:
            raise CannotFold("nothing reads its result")
        for reader in readers:
            self._into_reader(reader, name, s)

    def _into_reader(self, reader: Call, name: str, s: ScaleShift) -> None:
        network = self.network
        if reader.proto is None:
            raise CannotFold("it is a result of the network")
        if not network.reads_once(reader, name):
            raise CannotFold(f"{reader.describe()} reads its result twice, or in its body")
        first = network.inputs(reader)[0]
        if is_linear(network, reader) and first == name:
            linear = linear_of(network, reader)
            axis = linear.axis % len(network.shape(name))
            self._take(reader, linear.before(channel_vector(s, axis, linear.in_channels)))
        elif reader.op == "BatchNormalization" and first == name:
            norm = norm_of(network, reader)
            self._take(reader, norm.before(channel_vector(s, 1, norm.scale_shift.scale.numel())))
        elif reader.op == "Concat":
            tensors = [network.resolve(each) for each in reader.node.input]
            axis = reader.attribute("axis") % len(network.shape(name))
            sizes = [network.size(each, axis) for each in tensors]
            self.through.append(reader)
            self._into_readers(
                network.resolve(reader.node.output[0]), within_concatenation(s, axis, sizes, tensors.index(name))
            )
        elif moves.passes(reader) and first == name:
            self.through.append(reader)
            mapped = moves.through(network, reader, s, back=False)
            self._into_readers(network.resolve(reader.node.output[0]), mapped)
        else:
            raise CannotFold(f"{reader.describe()} reads its result")

    def _take(self, call: Call, state: Linear | Norm) -> None:
        if call in self.states:
            raise CannotFold(f"it reaches {call.describe()} in two ways")
        self.where.append(call)
        constant = self._constant_after(call, state) if isinstance(state, Linear) else None
        if constant is None:
            self.states[call] = state
            self.same.append(self.network.resolve(call.node.output[0]))

    def _constant_after(self, call: Call, linear: Linear) -> Call | None:
        """A MatMul has no bias: what it would need goes into the constant that is added to it, if one is."""
        network = self.network
        if linear.op != "MatMul" or linear.bias is None:
            return None
        readers = network.readers(call.node.output[0])
        if len(readers) != 1 or readers[0].op != "Add":
            return None
        added = added_to(network, readers[0])
        same = network.shape(readers[0].node.output[0]) == network.shape(call.node.output[0])
        if added is None or not same or (added.value.dim() and added.value.shape[-1] not in (1, linear.out_channels)):
            return None
        self.states[call] = linear.without_bias()
        self.states[readers[0]] = added.then(ScaleShift(torch.ones(()).double(), linear.bias))
        self.same.append(network.resolve(readers[0].node.output[0]))
        return readers[0]


def is_linear(network: Network, call: Call) -> bool:
    """Whether the call is, or has become, a linear layer."""
    return isinstance(network.states.get(call), Linear) or call.op in LINEAR


def linear_of(network: Network, call: Call) -> Linear:
    """The linear layer with what was folded into it."""
    state = network.states.get(call)
    return state if isinstance(state, Linear) else Linear.of(network, call)


def norm_of(network: Network, call: Call) -> Norm:
    """The batch normalization with what was folded into it."""
    state = network.states.get(call)
    return state if isinstance(state, Norm) else Norm.of(network, call)


def added_to(network: Network, call: Call) -> Added | None:
    """The constant that the call adds, with what was folded into it; None where it adds no constant."""
    state = network.states.get(call)
    return state if isinstance(state, Added) else Added.of(network, call)
