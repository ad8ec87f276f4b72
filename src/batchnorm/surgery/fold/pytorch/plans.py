"""Where one batch normalization can go: every call that would change, or the reason why none may."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from batchnorm.models import lowering
from batchnorm.models.model_graph import Shape, Trace
from batchnorm.surgery.fold import moves
from batchnorm.surgery.fold.arithmetic import ScaleShift, wide
from batchnorm.surgery.fold.states import CannotFold, Gone, Linear, Norm, State, read_once

_SPLITS = (torch.split, torch.chunk)
_LINEAR = {*lowering.CONVOLUTIONS, *lowering.TRANSPOSED, F.linear}


@dataclass(frozen=True, eq=False)
class Constant:
    """A parameter that is added.

    Attributes:
        value: float64.
        like: The parameter that it was.
        name: Its attribute.
    """

    value: Tensor
    like: Tensor
    name: str


class Network:
    """A traced model and what has become of its calls so far."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = {node: i for i, node in enumerate(trace.graph.nodes)}
        self.states: dict[Node, State | Constant] = {}
        self.values = dict(trace.values)
        self.pinned = lowering.mutated(trace.graph)
        self.unknown: dict[Node, str] = {}  # batch normalizations that cannot be folded at all, with the reason
        for node in trace.graph.nodes:
            try:
                if node.op == "call_module":
                    layer = trace.module.get_submodule(str(node.target))
                    if isinstance(layer, (nn.Linear, _ConvNd)):
                        self.states[node] = Linear.of_layer(node, layer)
                elif node.op != "call_function":
                    continue
                elif node.target is F.batch_norm:
                    self.states[node] = Norm.of(node, self.attribute)
                elif node.target in _LINEAR:
                    self.states[node] = Linear.of(node, self.attribute)
            except CannotFold as error:
                if node.target is F.batch_norm:
                    self.unknown[node] = str(error)

    def attribute(self, node: Node) -> Tensor:
        """The value of a `get_attr` node."""
        value: Any = self.trace.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value.detach()

    def norms(self) -> list[Node]:
        """The batch normalizations that are left, in order."""
        return [node for node, state in self.states.items() if isinstance(state, Norm)]

    @staticmethod
    def readers(node: Node) -> list[Node]:
        """The calls that read the node's values."""
        return [user for user in node.users if not lowering.asks_sizes(user)]

    def shape(self, node: Node) -> Shape:
        """Of the node's value.

        Raises:
            CannotFold: It is no tensor of one rank.
        """
        if node not in self.trace.shapes:
            raise CannotFold(f"the result of {moves.describe(node)} next to it has no shape of one rank")
        return self.trace.shapes[node]

    def size(self, node: Node, axis: int) -> int:
        """The node's size along an axis, which is the same for every input.

        Raises:
            CannotFold: It is not.
        """
        sizes = set(self.shape(node)[axis])
        if len(sizes) != 1:
            raise CannotFold("its number of channels is open")
        return sizes.pop()


@dataclass(eq=False)
class Plan:
    """What folding one batch normalization changes.

    Attributes:
        network: As it is before.
        states: What the changed calls become.
        through: Calls whose value changes.
        same: Nodes that must have the value they had.
        where: What takes it up, for the report.
        dead: Calls that nothing reads any more.
    """

    network: Network
    states: dict[Node, State | Constant] = field(default_factory=dict)
    through: list[Node] = field(default_factory=list)
    same: list[Node] = field(default_factory=list)
    where: list[Node] = field(default_factory=list)
    dead: list[Node] = field(default_factory=list)

    def carry_out(self, values: dict[Node, Any]) -> None:
        """Make the change; `values` are those of the nodes that it touches."""
        self.network.states.update(self.states)
        self.network.values.update(values)
        for node in self.dead:
            self.network.states.pop(node, None)

    def state(self, node: Node) -> State | Constant | None:
        """What the node is so far."""
        return self.states.get(node, self.network.states.get(node))

    @classmethod
    def back(cls, network: Network, node: Node) -> Plan:
        """Into what computes its input.

        Raises:
            CannotFold: There is something that cannot take it up.
        """
        plan = cls(network)
        norm = network.states[node]
        assert isinstance(norm, Norm)
        s = moves.broadcast(norm.scale_shift, 1, len(network.shape(node)))
        plan._into_result(norm.source, node, s)
        plan.states[node] = Gone(norm.source)
        plan.same.append(node)
        return plan

    @classmethod
    def on(cls, network: Network, node: Node) -> Plan:
        """Into everything that reads its result.

        Raises:
            CannotFold: There is something that cannot take it up.
        """
        plan = cls(network)
        norm = network.states[node]
        assert isinstance(norm, Norm)
        if node in network.pinned or norm.source in network.pinned:
            raise CannotFold("its tensor is changed in place")
        s = moves.broadcast(norm.scale_shift, 1, len(network.shape(node)))
        plan.states[node] = Gone(norm.source)
        plan._into_readers(node, s)
        return plan

    # Back ----------------------------------------------------------------------------------------------------------

    def _into_result(self, node: Node, reader: Node, s: ScaleShift) -> None:
        """Make the node's value `s` of what it was, for its only reader."""
        readers = self.network.readers(node)
        if readers != [reader] or not read_once(reader, node):
            others = [moves.describe(user) for user in readers if user is not reader]
            raise CannotFold(
                f"its input is also read by {others[0]}" if others else "its input is read twice by one call"
            )
        if node in self.network.pinned:
            raise CannotFold("its tensor is changed in place")
        state, shape = self.state(node), self.network.shape(node)
        if isinstance(state, Linear):
            axis = len(shape) - 1 if state.dims == 0 else 1
            if state.dims and len(shape) != state.dims + 2:
                raise CannotFold("the convolution before it has no batch axis")
            self._set(node, state.after(moves.channel_vector(s, axis, state.out_channels)))
            self.where.append(node)
        elif isinstance(state, Norm):
            self._set(node, state.then(moves.channel_vector(s, 1, state.scale_shift.scale.numel())))
            self.where.append(node)
        elif isinstance(state, Gone):
            self.through.append(node)
            self._into_result(state.source, node, s)
        elif node.op == "get_attr":
            value = state.value if isinstance(state, Constant) else wide(self.network.attribute(node))
            new = value * s.scale + s.shift
            if new.dim() != len(shape):
                raise CannotFold("a constant next to it has fewer dimensions")
            self._set(node, Constant(new, self.network.attribute(node), str(node.target)))
        elif node.target is torch.cat:
            self._into_concatenation(node, s)
        elif node.target is operator.add:
            self._into_sum(node, s)
        elif self._is_part(node):
            self._into_split(node, s)
        elif moves.passes(node):
            source = self._input(node)
            mapped = moves.through(node, s, shape, self.network.shape(source), back=True)
            self.through.append(node)
            self._into_result(source, node, mapped)
        else:
            raise CannotFold(f"it follows {moves.describe(node)}")

    def _into_concatenation(self, node: Node, s: ScaleShift) -> None:
        tensors, axis = self._concatenated(node)
        sizes = [self.network.size(t, axis) for t in tensors] if s.scale.shape[axis] != 1 else [0] * len(tensors)
        self.through.append(node)
        for tensor, part in zip(tensors, moves.part_of_concatenation(s, axis, sizes), strict=True):
            self._into_result(tensor, node, part)

    def _into_sum(self, node: Node, s: ScaleShift) -> None:
        shape, self_shift = self.network.shape(node), s
        self.through.append(node)
        for term in node.args:
            if not isinstance(term, Node):
                raise CannotFold("it follows an addition of a number")
            if term.op != "get_attr" and self.network.shape(term) != shape:
                raise CannotFold("it follows an addition that broadcasts")
            self._into_result(term, node, self_shift)
            self_shift = replace(s, shift=torch.zeros_like(s.shift))  # the shift goes into one of the two

    def _into_split(self, node: Node, s: ScaleShift) -> None:
        """Into what is split, for this part; the others stay as they are."""
        split: Node = node.args[0]  # type: ignore[assignment]
        source, axis, sizes = self._parts(split)
        self.through += [split, node]
        self.same += [part for part in split.users if part is not node]
        self._into_result(source, split, moves.within_concatenation(s, axis, sizes, node.args[1]))  # type: ignore[arg-type]

    # On ------------------------------------------------------------------------------------------------------------

    def _into_readers(self, node: Node, s: ScaleShift) -> None:
        """Let every reader of the node take up `s`, which its value no longer has."""
        readers = self.network.readers(node)
        if not readers:
            raise CannotFold("nothing reads its result")
        for reader in readers:
            self._into_reader(reader, node, s)

    def _into_reader(self, reader: Node, node: Node, s: ScaleShift) -> None:
        if not read_once(reader, node) and reader.target is not torch.cat:
            raise CannotFold(f"{moves.describe(reader)} reads its result twice")
        if reader in self.network.pinned:
            raise CannotFold("its tensor is changed in place")
        state, shape = self.state(reader), self.network.shape(node)
        if isinstance(state, Linear) and state.source is node:
            axis = len(shape) - 1 if state.dims == 0 else 1
            if state.dims and len(shape) != state.dims + 2:
                raise CannotFold("the convolution after it has no batch axis")
            self._set(reader, state.before(moves.channel_vector(s, axis, state.in_channels)))
            self.same.append(reader)
            self.where.append(reader)
        elif isinstance(state, Norm) and state.source is node:
            self._set(reader, state.before(moves.channel_vector(s, 1, state.scale_shift.scale.numel())))
            self.same.append(reader)
            self.where.append(reader)
        elif isinstance(state, Gone):
            self.through.append(reader)
            self._into_readers(reader, s)
        elif reader.target is torch.cat:
            tensors, axis = self._concatenated(reader)
            if tensors.count(node) != 1:
                raise CannotFold("a concatenation reads its result twice")
            sizes = [self.network.size(t, axis) for t in tensors]
            self.through.append(reader)
            self._into_readers(reader, moves.within_concatenation(s, axis, sizes, tensors.index(node)))
        elif reader.target in _SPLITS:
            _, axis, sizes = self._parts(reader)
            self.through.append(reader)
            for part in reader.users:
                self.through.append(part)
                self._into_readers(part, moves.part_of_concatenation(s, axis, sizes)[part.args[1]])  # type: ignore[index]
        elif moves.passes(reader) and self._input(reader) is node:
            mapped = moves.through(reader, s, shape, self.network.shape(reader), back=False)
            self.through.append(reader)
            self._into_readers(reader, mapped)
        else:
            raise CannotFold(f"{moves.describe(reader)} reads its result")

    # Both ----------------------------------------------------------------------------------------------------------

    def _set(self, node: Node, state: State | Constant) -> None:
        self.states[node] = state

    @staticmethod
    def _input(node: Node) -> Node:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(source, Node):
            raise CannotFold(f"{moves.describe(node)} next to it takes several tensors")
        return source

    @staticmethod
    def _is_part(node: Node) -> bool:
        """Whether it is one part of a split tensor."""
        return (
            node.target is operator.getitem
            and isinstance(node.args[0], Node)
            and node.args[0].target in _SPLITS
            and isinstance(node.args[1], int)
            and node.args[1] >= 0
        )

    def _parts(self, split: Node) -> tuple[Node, int, list[int]]:
        """What is split, along which axis, and the parts' sizes."""
        source, how = self._input(split), split.args[1] if len(split.args) > 1 else None
        axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
        sizes = how if isinstance(how, (tuple, list)) else [how]
        computed = not all(isinstance(size, int) for size in (*sizes, axis))
        if computed or set(split.kwargs) - {"dim"} or not all(self._is_part(part) for part in split.users):
            raise CannotFold("a split next to it has computed arguments")
        axis = int(axis) % len(self.network.shape(source))  # type: ignore[arg-type]
        whole = torch.empty(self.network.size(source, axis))
        return source, axis, [len(part) for part in split.target(whole, how)]  # type: ignore[operator]

    def _concatenated(self, node: Node) -> tuple[list[Node], int]:
        given = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if (
            not isinstance(given, (tuple, list))
            or not all(isinstance(t, Node) for t in given)
            or isinstance(axis, Node)
        ):
            raise CannotFold("a concatenation next to it has computed arguments")
        rank = len(self.network.shape(node))
        return list(given), int(axis) % rank  # type: ignore[arg-type]
