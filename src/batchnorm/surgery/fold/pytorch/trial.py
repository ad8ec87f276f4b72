"""One fold in a network of PyTorch, computed before and after in float64 and in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.gate import Results
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm
from batchnorm.surgery.fold.search import Trial
from batchnorm.surgery.fold.states import NewConstants, State


def try_plan(network: TorchNetwork, plan: FoldPlan[Node, Node]) -> Trial[Node]:
    """Compute the calls that the plan touches, before and after, on the example's values and on random ones.

    Raises:
        arithmetic.NotRepresentable: A weight is not finite in its dtype.
    """
    calls = {*plan.states, *plan.gone, *plan.through}
    touched = {*calls, *plan.same, *(result for call in calls for result in network.results(call))}
    region = sorted(touched, key=network.order.__getitem__)
    before = _Region(network, region, network.states, {})
    remaining = [node for node in region if node not in plan.gone]
    after = _Region(network, remaining, {**network.states, **plan.states}, plan.alias)
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
        runs.append(
            Results(
                [own[node] for node in same],
                [folded[network.resolve(node, plan.alias)] for node in same],
                [exact[node] for node in same],
            )
        )
        changed = changed or {node: folded[node] for node in remaining}
    return Trial(runs, changed)


class _Region:
    """Some calls of a network, in order, with the states that they have."""

    def __init__(
        self, network: TorchNetwork, nodes: list[Node], states: Mapping[Node, State], alias: Mapping[Node, Node]
    ) -> None:
        self._network, self._nodes, self._alias = network, nodes, alias
        self._states = dict(states)
        for node in nodes:
            if node.op == "call_module" and node not in states:  # a layer computes in its own dtype only
                self._states[node] = network.linear(node)

    def boundary(self) -> list[Node]:
        """Return the values that the calls read and do not compute."""
        inside = set(self._nodes)
        read: list[Node] = []
        for node in self._nodes:
            state = self._states.get(node)
            read += node.all_input_nodes if state is None or isinstance(state, NewConstants) else [state.source]
        return [node for node in map(self._resolve, read) if node not in inside and node.op != "get_attr"]

    def run(self, boundary: Mapping[Node, Any], dtype: torch.dtype) -> dict[Node, Any]:
        """Return the value of every call. In float64 weights are not rounded."""
        values = {node: _to(value, dtype) for node, value in boundary.items()}
        with torch.no_grad():
            for node in self._nodes:
                values[node] = self._result(node, values, dtype)
        return values

    def _result(self, node: Node, values: Mapping[Node, Any], dtype: torch.dtype) -> Any:
        state = self._states.get(node)
        if isinstance(state, (TorchLinear, TorchNorm)):
            return state(values[self._resolve(state.source)])
        constants = state.values if isinstance(state, NewConstants) else {}

        def value(argument: Node) -> Any:
            if argument.op != "get_attr":
                return values[self._resolve(argument)]
            stored = self._network.attribute(argument)
            if argument not in constants:
                return _to(stored, dtype)
            new = constants[argument]
            return (new if dtype == torch.float64 else rounded(new, stored)).to(device=stored.device, dtype=dtype)

        assert callable(node.target)
        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)

    def _resolve(self, node: Node) -> Node:
        return self._network.resolve(node, self._alias)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _random(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
