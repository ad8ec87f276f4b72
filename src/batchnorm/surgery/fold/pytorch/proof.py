"""Compute the places that are proven in a PyTorch network, in the model's own dtype and in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.network import Call, Kind, Network
from batchnorm.surgery.fold.proof import Proof
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import TorchLinear, TorchNorm
from batchnorm.surgery.fold.states import NewConstants, State


class TorchProof(Proof):
    """A proof for a traced model."""

    def compute(
        self, network: Network, given: Mapping[Node, Node], places: Sequence[Node], *, random: bool, wide: bool
    ) -> Iterator[Tensor]:
        """Yield the values at these places, in order."""
        assert isinstance(network, TorchNetwork)
        run = _Run(network, given, random, wide)
        for place in places:
            yield run.computed(place)


class _Run:
    """One run of some calls. In float64 new weights are not rounded."""

    def __init__(self, network: TorchNetwork, given: Mapping[Node, Node], random: bool, wide: bool) -> None:
        self._network, self._given, self._random, self._wide = network, given, random, wide
        self._kept: dict[Call, dict[Node, Any]] = {}
        self._number = {node: i for i, node in enumerate(network.trace.graph.nodes)}

    def computed(self, node: Node) -> Any:
        """Return the value that its call computes."""
        call = self._network.writer(node)
        assert call is not None
        if call in self._kept:
            return self._kept[call][node]
        with torch.no_grad():
            result = self._result(call)
        results = dict(zip(call.results, result if call.kind is Kind.SPLIT else (result,), strict=True))
        if any(value is not None and value not in self._given for value in call.results):
            self._kept[call] = results  # other calls may read it; given values take no memory here
        return results[node]

    def _read(self, node: Node) -> Any:
        if node not in self._given:
            return self.computed(node)
        original = self._given[node]
        value = self._network.value(original)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if self._random:
            generator = torch.Generator().manual_seed(self._number[original])
            value = torch.randn(value.shape, generator=generator, device="cpu").to(value)
        return value.double() if self._wide else value

    def _result(self, call: Call) -> Any:
        node, state = call.node, self._state(call)
        if isinstance(state, (TorchLinear, TorchNorm)):
            return state(self._read(call.inputs[0]))
        constants = state.values if isinstance(state, NewConstants) else {}

        def argument(given: Node) -> Any:
            if given.op != "get_attr":
                return self._read(self._network.resolve(given))
            stored = self._network.attribute(given)
            if given in constants:
                new = constants[given]
                return new.to(stored.device) if self._wide else rounded(new, stored)
            return stored.double() if self._wide and stored.is_floating_point() else stored

        args, kwargs = map_arg((node.args, node.kwargs), argument)
        return node.target(*args, **kwargs)

    def _state(self, call: Call) -> State | None:
        # A layer that was not traced computes in its own dtype only.
        return self._network.layer(call) if call.state is None and call.node.op == "call_module" else call.state
