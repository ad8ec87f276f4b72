"""Compute the part of a PyTorch network around one fold, before and after, in float64 and in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from batchnorm.models.gate import Results
from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm
from batchnorm.surgery.fold.search import Trial
from batchnorm.surgery.fold.states import Layer, NewConstants, State


def try_plan(network: TorchNetwork, plan: FoldPlan) -> Trial:
    """Compute the calls that the plan touches, before and after, on the example's values and on random ones.

    Raises:
        arithmetic.NotRepresentable: A weight is not finite in its dtype.
    """
    calls = {*plan.states, *plan.gone, *plan.through}
    touched = {*plan.same, *(node for call in calls for node in (call.node, *call.results))}
    region = [node for node in network.trace.graph.nodes if node in touched]
    gone = {call.node for call in plan.gone}
    remaining = [node for node in region if node not in gone]
    before = _Region(network, region, FoldPlan(network))
    after = _Region(network, remaining, plan)
    example = {node: network.value(node) for node in (*before.boundary(), *after.boundary())}
    generator = torch.Generator().manual_seed(0)
    random = {node: _random(value, generator) for node, value in example.items()}
    same = dict.fromkeys(plan.same)
    dtype = network.values[plan.same[0]].dtype
    runs: list[Results] = []
    changed: dict[Node, Any] = {}
    for given in (example, random):
        exact, own = before.run(given, torch.float64), before.run(given, dtype)
        folded = after.run(given, dtype)
        after_change = [folded[plan.now(node)] for node in same]
        runs.append(Results([own[node] for node in same], after_change, [exact[node] for node in same]))
        changed = changed or {node: folded[node] for node in remaining}
    return Trial(runs, changed)


class _Region:
    """Some nodes of a network, in order, after a plan's change."""

    def __init__(self, network: TorchNetwork, nodes: list[Node], plan: FoldPlan) -> None:
        self._network, self._nodes, self._plan = network, nodes, plan
        self._calls = {call.node: call for call in network.calls}

    def boundary(self) -> list[Node]:
        """Return the values that the nodes read but do not compute."""
        inside = set(self._nodes)
        read = [value for node in self._nodes for value in self._inputs(node)]
        return [node for node in read if node not in inside and node.op != "get_attr"]

    def run(self, boundary: Mapping[Node, Any], dtype: torch.dtype) -> dict[Node, Any]:
        """Return the value of every node. In float64 weights are not rounded."""
        values = {node: _to(value, dtype) for node, value in boundary.items()}
        with torch.no_grad():
            for node in self._nodes:
                values[node] = self._result(node, values, dtype)
        return values

    def _state(self, node: Node) -> State | None:
        call = self._calls.get(node)
        if call is None:
            return None
        state = self._plan.states.get(call, call.state)
        # A layer that was not traced computes in its own dtype only.
        return self._network.layer(call) if state is None and node.op == "call_module" else state

    def _inputs(self, node: Node) -> list[Node]:
        call = self._calls.get(node)
        if call is None or not isinstance(self._state(node), Layer):
            return [self._now(value) for value in node.all_input_nodes]
        return self._plan.inputs(call)[:1]

    def _now(self, node: Node) -> Node:
        now: Node = self._plan.now(self._network.resolve(node))
        return now

    def _result(self, node: Node, values: Mapping[Node, Any], dtype: torch.dtype) -> Any:
        state = self._state(node)
        if isinstance(state, (TorchLinear, TorchNorm)):
            return state(values[self._inputs(node)[0]])
        constants = state.values if isinstance(state, NewConstants) else {}

        def value(argument: Node) -> Any:
            if argument.op != "get_attr":
                return values[self._now(argument)]
            stored = self._network.attribute(argument)
            if argument not in constants:
                return _to(stored, dtype)
            new = constants[argument]
            return (new if dtype == torch.float64 else rounded(new, stored)).to(device=stored.device, dtype=dtype)

        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _random(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
