"""Represent a traced model as the graph that the search works on."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg
from torch.nn import functional as F

from batchnorm.models.graphs import lowering
from batchnorm.models.graphs.model_graph import Trace
from batchnorm.surgery.fold.arithmetic import rounded, wide
from batchnorm.surgery.fold.network import Call, Kind, Network
from batchnorm.surgery.fold.pytorch import moves
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm, is_linear_layer, linear_arguments
from batchnorm.surgery.fold.states import CannotFold, Linear, NewConstants, State

_LINEAR = {*lowering.CONVOLUTIONS, *lowering.TRANSPOSED, F.linear}
_SPLITS = (torch.split, torch.chunk)
_NAMES: dict[Any, str] = {operator.add: "an addition", torch.cat: "a concatenation", operator.mul: "a multiplication"}


class TorchNetwork(Network):
    """A traced model. Each node of the graph is both a call and its result; only a split's results are separate nodes.

    Attributes:
        trace: The traced model.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        calls: dict[Node, Call] = {}
        duplicates: dict[Node, Node] = {}  # parts of a split that are taken twice
        parts: set[Node] = set()
        for node in trace.graph.nodes:
            if node.op not in ("placeholder", "get_attr") and node not in parts:
                calls[node] = self._read(node)
                if calls[node].kind is Kind.SPLIT:
                    parts |= set(node.users)
                    first = {part.args[1]: part for part in calls[node].results if part is not None}
                    duplicates |= {part: first[part.args[1]] for part in node.users if part is not first[part.args[1]]}
        super().__init__(list(calls.values()), trace.values, trace.shapes)
        self.pinned = lowering.mutated(trace.graph)
        for node, call in calls.items():
            if node.target is F.batch_norm:
                try:
                    self.norms[call] = TorchNorm.of_call(node, self.attribute)
                    call.kind, call.inputs = Kind.NORM, call.inputs[:1]
                except CannotFold as error:
                    self.unfoldable[call] = str(error)
        self.change({}, (), {}, duplicates)

    def _read(self, node: Node) -> Call:
        call = Call(node, Kind.OTHER, describe(node), operands(node), [node])
        target, inputs = node.target, call.inputs
        if node.op == "output":
            call.kind = Kind.OUTPUT
        elif lowering.asks_sizes(node):
            call.kind = Kind.SIZE
        elif node.op == "call_module":
            if is_linear_layer(node, self._module(node)):
                call.kind = Kind.LINEAR
        elif node.op != "call_function":
            pass
        elif target in _LINEAR:
            if linear_arguments(node) is not None:
                call.kind = Kind.LINEAR
        elif target in (operator.add, operator.sub):
            call.kind = Kind.SUM if target is operator.add else Kind.DIFFERENCE
        elif target is torch.cat:
            self._read_concatenation(call)
        elif target in _SPLITS:
            self._read_split(call)
        elif target in moves.RULES and inputs:
            call.kind, call.rule = Kind.TRANSPARENT, partial(moves.RULES[target], node)
        return call

    def _read_concatenation(self, call: Call) -> None:
        node = call.node
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if isinstance(tensors, (tuple, list)) and isinstance(axis, int) and node in self.trace.shapes:
            call.kind, call.axis = Kind.CONCATENATION, axis % len(self.trace.shapes[node])

    def _read_split(self, call: Call) -> None:
        """Read a split whose sizes are not computed, and whose parts are taken by number."""
        node = call.node
        how = node.args[1] if len(node.args) > 1 else None
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        given = all(isinstance(n, int) for n in (*(how if isinstance(how, (tuple, list)) else [how]), axis))
        if not given or set(node.kwargs) - {"dim"} or node.args[0] not in self.trace.shapes:
            return
        shape = self.trace.shapes[node.args[0]]
        sizes = set(shape[axis % len(shape)])
        if len(sizes) == 1 and all(_is_part(user) for user in node.users):
            call.kind, call.axis = Kind.SPLIT, axis % len(shape)
            call.sizes = [len(part) for part in node.target(torch.empty(sizes.pop(), device="cpu"), how)]
            taken = {part.args[1]: part for part in reversed(node.users)}
            call.results = [taken.get(i) for i in range(len(call.sizes))]

    def _module(self, node: Node) -> torch.nn.Module:
        return self.trace.module.get_submodule(str(node.target))

    def attribute(self, node: Node) -> Tensor:
        """Return the value of a `get_attr` node."""
        value: Any = self.trace.module
        for name in str(node.target).split("."):
            value = getattr(value, name)
        assert isinstance(value, Tensor)
        return value.detach()

    def value(self, node: Node) -> Any:
        """Return the node's value for the example: a tensor, or a size computed from one."""
        if node in self.values or node.op not in ("call_function", "call_method"):
            return self.values[node]
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def constant(self, value: Node) -> Tensor | None:
        """Return the value of a floating-point parameter or buffer in float64; None for any other node."""
        if value.op != "get_attr":
            return None
        found = self.attribute(value)
        return wide(found) if found.is_floating_point() else None

    def read_linear(self, call: Call) -> Linear:
        """Return the layer that a call of kind `LINEAR` represents, before any fold."""
        if call.node.op == "call_module":
            return TorchLinear.of_layer(call.node, self._module(call.node))
        return TorchLinear.of_call(call.node, self.attribute)

    def check_storable(self, call: Call, state: State) -> None:
        """Check that every new weight is finite in its dtype.

        Raises:
            arithmetic.NotRepresentable: One is not.
        """
        if isinstance(state, TorchLinear):
            state.tensors  # noqa: B018  (it raises, and is kept)
        elif isinstance(state, TorchNorm):
            state.arguments()
        elif isinstance(state, NewConstants):
            for constant, value in state.values.items():
                rounded(value, self.attribute(constant))

    def replacement(self, source: Node, result: Node, *, back: bool) -> tuple[Node, Node]:
        """Return the value to replace, and its replacement, when a call is removed: its result and its source."""
        return result, source


def describe(node: Node) -> str:
    """Describe the call."""
    target = node.target
    if node.op == "output":
        return "the network's output"
    if isinstance(target, torch._ops.OpOverload):
        return target._opname
    if node.op == "call_module":
        layer = node.graph.owning_module.get_submodule(str(target))  # type: ignore[union-attr]
        return f"the layer {target} ({type(layer).__name__})"
    return _NAMES.get(target) or str(getattr(target, "__name__", target))


def operands(node: Node) -> list[Node]:
    """Return the nodes among the arguments of a call, with repetitions; its input comes first."""
    found: list[Node] = []
    others = {name: value for name, value in node.kwargs.items() if name != "input"}
    map_arg((node.kwargs.get("input"), node.args, others), found.append)
    return found


def _is_part(node: Node) -> bool:
    """Return whether the node takes one part of a split by its number."""
    return node.target is operator.getitem and isinstance(node.args[1], int) and node.args[1] >= 0
