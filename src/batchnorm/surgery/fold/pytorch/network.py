"""A traced model as the graph that the search works on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg
from torch.nn import functional as F

from batchnorm.models import lowering
from batchnorm.models.model_graph import Trace
from batchnorm.surgery.fold.arithmetic import ScaleShift, wide
from batchnorm.surgery.fold.network import Kind, Network, Shape, Split
from batchnorm.surgery.fold.pytorch import moves
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm, is_linear_layer, linear_arguments
from batchnorm.surgery.fold.states import CannotFold, Linear

_SPLITS = (torch.split, torch.chunk)
_LINEAR = {*lowering.CONVOLUTIONS, *lowering.TRANSPOSED, F.linear}
_KINDS: dict[Any, Kind] = {F.batch_norm: Kind.NORM, operator.add: Kind.SUM, torch.cat: Kind.CONCATENATION}
_NAMES: dict[Any, str] = {operator.add: "an addition", torch.cat: "a concatenation", operator.mul: "a multiplication"}


class TorchNetwork(Network[Node, Node]):
    """A traced model. A node is a call and its result at once; only a split has other nodes as its results.

    Attributes:
        trace: The traced model.
        order: The position of every node.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.order = {node: position for position, node in enumerate(trace.graph.nodes)}
        self._splits: dict[Node, Split] = {}
        for node in trace.graph.nodes:
            split = self._read_split(node) if node.target in _SPLITS else None
            if split is not None:
                self._splits[node] = split
        parts = {part for split in self._splits.values() for part in split.parts}
        calls = [n for n in trace.graph.nodes if n.op not in ("placeholder", "get_attr") and n not in parts]
        super().__init__(calls, trace.values)
        self._operands = {node: operands(node) for node in calls}
        self.pinned = lowering.mutated(trace.graph)
        for node in calls:
            if node.target is F.batch_norm:
                try:
                    self.norms[node] = TorchNorm.of_call(node, self.attribute)
                except CannotFold as error:
                    self.unfoldable[node] = str(error)
        self.refresh()

    def attribute(self, node: Node) -> Tensor:
        """Return the value of a `get_attr` node."""
        value: Any = self.trace.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value.detach()

    def value(self, node: Node) -> Any:
        """Return what the node gives for the example: a tensor, or a size computed from one."""
        if node in self.values or node.op not in ("call_function", "call_method"):
            return self.values[node]
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def kind(self, call: Node) -> Kind:
        """Return what the call, as it is now, lets a scale and shift do."""
        if isinstance(self.states.get(call), Linear) or self._is_linear(call):
            return Kind.LINEAR
        if call.op == "output":
            return Kind.OUTPUT
        if call in self._splits:
            return Kind.SPLIT
        if call in self.unfoldable or call.op != "call_function":
            return Kind.OTHER
        return _KINDS.get(call.target, Kind.TRANSPARENT if call.target in moves.RULES else Kind.OTHER)

    def _is_linear(self, call: Node) -> bool:
        if call.op == "call_module":
            return is_linear_layer(call, self.trace.module.get_submodule(str(call.target)))
        return call.op == "call_function" and call.target in _LINEAR and linear_arguments(call) is not None

    def operands(self, call: Node) -> Sequence[Node]:
        """Return what the original call reads, its input first, as often as it reads it."""
        return self._operands[call]

    def results(self, call: Node) -> Sequence[Node]:
        """Return the tensors that the call computes."""
        return list(self._splits[call].parts) if call in self._splits else [call]

    def asks_size(self, call: Node) -> bool:
        """Whether the call reads only sizes or types, no values."""
        return lowering.asks_sizes(call)

    def constant(self, value: Node) -> Tensor | None:
        """Return the value of a floating-point parameter or buffer in float64; None for any other node."""
        if value.op != "get_attr":
            return None
        found = self.attribute(value)
        return wide(found) if found.is_floating_point() else None

    def known_shape(self, value: Node) -> Shape | None:
        """Return the node's shape, if it is a tensor that always has the same rank."""
        return self.trace.shapes.get(value)

    def read_linear(self, call: Node) -> Linear:
        """Return the layer that the original call is."""
        if call.op == "call_module":
            return TorchLinear.of_layer(call, self.trace.module.get_submodule(str(call.target)))
        return TorchLinear.of_call(call, self.attribute)

    def axis(self, call: Node) -> int:
        """Return the axis of a concatenation, not negative.

        Raises:
            CannotFold: It is computed, or the list of tensors is.
        """
        tensors = call.args[0] if call.args else call.kwargs.get("tensors")
        axis: Any = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", call.kwargs.get("axis", 0))
        if not isinstance(tensors, (tuple, list)) or isinstance(axis, Node):
            raise CannotFold("a concatenation next to it has computed arguments")
        return int(axis) % len(self.shape(call))

    def split(self, call: Node) -> Split:
        """Return how a split splits its input."""
        return self._splits[call]

    def _read_split(self, node: Node) -> Split | None:
        """Return how the call splits a tensor; None if that is computed, or the parts are not taken by number."""
        source, how = node.args[0], node.args[1] if len(node.args) > 1 else None
        axis: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        sizes = how if isinstance(how, (tuple, list)) else [how]
        computed = not all(isinstance(size, int) for size in (*sizes, axis))
        if computed or set(node.kwargs) - {"dim"} or not isinstance(source, Node) or source not in self.trace.shapes:
            return None
        shape = self.trace.shapes[source]
        axis %= len(shape)
        if len(set(shape[axis])) != 1 or not all(_is_part(user) for user in node.users):
            return None
        lengths = [len(part) for part in node.target(torch.empty(shape[axis][0]), how)]  # type: ignore[operator]
        return Split(axis, lengths, {user: user.args[1] for user in node.users})  # type: ignore[misc]

    def through(self, call: Node, s: ScaleShift, *, back: bool) -> ScaleShift:
        """Return the equivalent of a scale and shift on the other side of a transparent call."""
        ends = (self.shape(call), self.shape(self._operands[call][0]))
        given, wanted = ends if back else ends[::-1]
        return moves.RULES[call.target](moves.Move(call, s, given, wanted, back))

    def subtracts(self, call: Node) -> bool | None:
        """Return False for an addition of two tensors, True for a subtraction, None for any other call."""
        if call.target not in (operator.add, operator.sub) or call.kwargs or len(self._operands[call]) != 2:
            return None
        return call.target is operator.sub

    def removal(self, source: Node, result: Node, *, back: bool) -> tuple[Node, Node]:
        """Return which of a removed call's two tensors is replaced by which: always the result by the source."""
        return result, source

    def describe(self, call: Node) -> str:
        """Return the call in words."""
        return describe(call)


def describe(call: Node) -> str:
    """Return the call in words."""
    target = call.target
    if call.op == "output":
        return "the network's output"
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    if call.op == "call_module":
        layer = call.graph.owning_module.get_submodule(str(target))  # type: ignore[union-attr]
        return f"the layer {target} ({type(layer).__name__})"
    return _NAMES.get(target) or str(getattr(target, "__name__", target))


def operands(call: Node) -> list[Node]:
    """Return the nodes among the arguments of a call, its input first, as often as they are there."""
    found: list[Node] = []
    others = {name: value for name, value in call.kwargs.items() if name != "input"}
    map_arg((call.kwargs.get("input"), call.args, others), found.append)
    return found


def _is_part(node: Node) -> bool:
    """Whether it takes one part of a split by its number."""
    return node.target is operator.getitem and isinstance(node.args[1], int) and node.args[1] >= 0
