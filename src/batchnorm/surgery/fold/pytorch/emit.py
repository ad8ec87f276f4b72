"""Write the folded network as a module that calls plain functions with its own parameters."""

from __future__ import annotations

import itertools
import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.nn import functional as F

import batchnorm.functional
from batchnorm import ops
from batchnorm.models.graphs.lowering import CONVOLUTIONS, TRANSPOSED, activation_of, written
from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.pytorch.network import TorchNetwork, operands
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm, with_parameters
from batchnorm.surgery.fold.states import NewConstants

_IN_PLACE = (F.relu, F.relu6, F.hardtanh, F.leaky_relu)


class Emitter:
    """Write the states of a network into its graph."""

    def __init__(self, network: TorchNetwork) -> None:
        self.network = network
        self.module = network.trace.module
        self.graph = network.trace.graph
        self.fused: dict[Node, str] = {}  # calls of the traced graph, and what each is fused with
        self._current: dict[Node, Node] = {}
        self._uses: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._uses[str(node.target)] = self._uses.get(str(node.target), 0) + len(node.users)

    def emit(self, name: str) -> fx.GraphModule:
        """Return the folded network as a graph module whose class has this name."""
        network = self.network
        norms: dict[Node, Node] = {}  # each with its current call
        calls = {call.node: call for call in network.calls}
        for node in list(self.graph.nodes):
            call = calls.get(node)
            state = None if call is None or call.gone else call.state
            if node in network.alias:
                self._replace(node, self._now(network.alias[node]))
            elif call is not None and isinstance(state, TorchLinear):
                self._linear(call, state)
            elif isinstance(state, NewConstants):
                self._constants(node, state)
            elif call in network.norms and not call.gone:
                norms[node] = self._norm(call, state) if isinstance(state, TorchNorm) else node
        for was, node in norms.items():
            self._fuse(node, was)
        self._drop_unused()
        self._in_place()
        self.graph.lint()
        folded = fx.GraphModule(self.module, self.graph, name)
        folded.eval()
        return folded

    def _now(self, node: Node) -> Node:
        """Return the node that currently replaces the given one in the graph."""
        while node in self._current:
            node = self._current[node]
        return node

    # Parameters ----------------------------------------------------------------------------------------------------

    def _own(self, name: str, value: Tensor, like: Tensor) -> str:
        """Add a parameter. Return its name: that of the replaced tensor, or a new one if other calls use it."""
        if self._uses.get(name, 0) > 1:
            self._uses[name] -= 1
            stem, _, last = name.rpartition(".")
            taken = (f"{stem}_{i}.{last}" if stem else f"{last}_{i}" for i in itertools.count(2))
            name = next(n for n in taken if n not in self._uses)
        self._uses[name] = 1
        owner: nn.Module = self.module
        *path, last = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if last in owner._buffers:
            owner._buffers[last] = value
        else:
            if last not in owner._parameters and hasattr(owner, last):
                delattr(owner, last)
            owner.register_parameter(last, nn.Parameter(value, requires_grad=like.requires_grad))
        return name

    def _attribute(self, before: Node, name: str) -> Node:
        with self.graph.inserting_before(before):
            return self.graph.get_attr(name)

    # Calls ---------------------------------------------------------------------------------------------------------

    def _constants(self, node: Node, state: NewConstants) -> None:
        for constant, value in state.values.items():
            like = self.network.attribute(constant)
            new = self._attribute(node, self._own(str(constant.target), rounded(value, like), like))
            node.replace_input_with(constant, new)

    def _replace(self, node: Node, new: Node) -> None:
        self._current[node] = new
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _layer(self, node: Node, state: TorchLinear) -> None:
        """Give new parameters to a layer that has its own forward method."""
        weight, bias, _ = (
            None if t is None else nn.Parameter(t, requires_grad=state.like.requires_grad) for t in state.tensors
        )
        calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == node.target]
        if len(calls) > 1:  # the other calls keep the original
            target = next(n for i in itertools.count(2) if not hasattr(self.module, n := f"{node.target}_{i}"))
        else:
            target = str(node.target)
        owner, _, last = target.rpartition(".")
        self.module.get_submodule(owner).add_module(last, with_parameters(state.kind, weight, bias))
        node.target = target

    def _linear(self, call: Call, state: TorchLinear) -> None:
        node: Node = call.node
        if state.opaque:
            self._layer(node, state)
            return
        weight, bias, border = state.tensors
        name = self._own(state.name, weight, state.like)
        stem = name.removesuffix("weight") if name.endswith("weight") else f"{name}_"
        held: list[Node | None] = [self._attribute(node, name), None, None]
        if bias is not None:
            self._uses.pop(f"{stem}bias", None)  # this layer's other calls have been given their own
            held[1] = self._attribute(node, self._own(f"{stem}bias", bias, state.like))
        if border is not None:
            held[2] = self._attribute(node, self._own(f"{stem}border", border, state.like))
        with self.graph.inserting_before(node):
            new = state.calls(self.graph.call_function, self._now(call.inputs[0]), *held)
        new.meta = dict(node.meta)
        self._replace(node, new)

    def _norm(self, call: Call, state: TorchNorm) -> Node:
        node: Node = call.node
        *tensors, eps = state.arguments()
        stem = str(node.args[1].target).removesuffix("running_mean")  # type: ignore[union-attr]
        held = [
            self._attribute(node, self._own(f"{stem}{last}", value, value))
            for last, value in zip(("running_mean", "running_var", "weight", "bias"), tensors, strict=True)
        ]
        with self.graph.inserting_before(node):
            new = self.graph.call_function(F.batch_norm, (self._now(call.inputs[0]), *held, False, 0.0, eps))
        new.meta = dict(node.meta)
        self._replace(node, new)
        return new

    def _fuse(self, node: Node, was: Node) -> None:
        """Fuse batch normalization with the addition and the activation that follow it, if any."""
        last, residual = node, None
        reader = _only_reader(last)
        if reader is not None and reader.target is operator.add:
            others = [term for term in reader.args if term is not node]
            if len(others) == 1 and isinstance(others[0], Node) and self.network.same_shape(others[0], was):
                last, residual, reader = reader, others[0], _only_reader(reader)
        found = None if reader is None or reader.all_input_nodes != [last] else activation_of(reader)
        if found is None and residual is None:
            return
        options: dict[str, Any] = {} if residual is None else {"residual": residual}
        names = [] if residual is None else ["the addition"]
        if found is not None:
            name, value = found
            options["activation"] = name
            names.append(name)
            if parameter := ops.ACTIVATIONS[name].parameter:
                options[parameter] = value
        end = last if found is None or reader is None else reader
        with self.graph.inserting_before(end):
            new = self.graph.call_function(batchnorm.functional.batch_norm, node.args, options)
        new.meta = dict(node.meta)
        self._replace(end, new)
        for gone in dict.fromkeys((last, node)):
            if gone is not end:
                self.graph.erase_node(gone)
        self.fused[was] = " and ".join(names)

    def _drop_unused(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            unused = node.op in ("get_attr", "call_function") and not node.users and not node.is_impure()
            if unused and not written(node):
                self.graph.erase_node(node)

    def _in_place(self) -> None:
        """Let activations overwrite new tensors that nothing else reads."""
        fresh = {*CONVOLUTIONS, *TRANSPOSED, F.linear, operator.add, batchnorm.functional.batch_norm, F.batch_norm}
        for node in self.graph.nodes:
            source = node.args[0] if node.args else None
            if node.target not in _IN_PLACE or not isinstance(source, Node) or len(source.users) != 1:
                continue
            if source.target in fresh:
                node.kwargs = {**node.kwargs, "inplace": True}


def _only_reader(node: Node) -> Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 and operands(readers[0]).count(node) == 1 else None
