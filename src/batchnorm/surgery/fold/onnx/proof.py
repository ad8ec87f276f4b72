"""Compute the places that are proven in an ONNX graph, in the model's own type and in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from torch import Tensor

from batchnorm.models.execution.progress import Bar
from batchnorm.models.gate import relative
from batchnorm.surgery.fold.network import Call, Network
from batchnorm.surgery.fold.onnx.graph import Array
from batchnorm.surgery.fold.onnx.network import OnnxNetwork
from batchnorm.surgery.fold.onnx.nodes import as_tensor, renamed
from batchnorm.surgery.fold.onnx.running import Feeds, Runner, exact, is_floating
from batchnorm.surgery.fold.proof import Proof, region
from batchnorm.surgery.fold.states import CannotFold

# Rounding in a few operations cannot cause an error this large: the reference must define one of them differently.
IMPLAUSIBLE = 0.1


class OnnxProof(Proof):
    """A proof for the main graph of a model.

    Args:
        original: The network before any fold.
        tolerance: The relative error that is allowed at one place.
        shown: The progress bar.
        runner: Runs models like the original.
        model: The original.
    """

    def __init__(
        self, original: OnnxNetwork, tolerance: float, shown: Bar, runner: Runner, model: onnx.ModelProto
    ) -> None:
        super().__init__(original, tolerance, shown)
        self._network, self._runner = original, runner
        self._opsets, self._ir_version = list(model.opset_import), max(model.ir_version, 4)

    def compute(
        self, network: Network, given: Mapping[str, str], places: Sequence[str], *, random: bool, wide: bool
    ) -> Iterable[Array]:
        """Return the values at these places, in order."""
        assert isinstance(network, OnnxNetwork)
        if not places:
            return []
        part, feeds = self._part(network, region(network, given, places), given, places)
        if random:
            feeds = {name: self._random(name, value) for name, value in feeds.items()}
        try:
            (found,) = self._runner.run(part, feeds)
        except Exception as error:
            raise CannotFold(f"trying it failed: {' '.join(str(error).split())[:200]}") from error
        if wide:
            found = self._plausible(found, exact(part, feeds))
        return [found[place] for place in places]

    def _plausible(self, own: Feeds, right: list[Feeds] | None) -> Feeds:
        """Return the results in float64, or those in the model's own type if there are no credible ones."""
        if right is None or max(relative(own[name], right[0][name]) for name in own) > IMPLAUSIBLE:
            return own
        return right[0]

    def _random(self, name: str, value: Array) -> Array:
        if not is_floating(value):
            return value
        generator = np.random.default_rng(list(name.encode()))
        return generator.standard_normal(value.shape).astype(value.dtype)

    def _part(
        self, network: OnnxNetwork, calls: Sequence[Call], given: Mapping[str, str], places: Sequence[str]
    ) -> tuple[onnx.ModelProto, Feeds]:
        """Return a model of these calls alone, and its inputs. The inputs are given values, under other names."""
        stored: dict[str, onnx.TensorProto] = {}
        count = iter(range(1_000_000))

        def keep(name: str, value: Tensor) -> str:
            kept = f"folded weight {next(count)}"
            stored[kept] = as_tensor(kept, value)
            return kept

        writer = network.nodes_writer(keep, lambda stem: f"{stem} {next(count)}")
        nodes, feeds = [], {}
        for call in calls:
            own: set[str] = set()  # the results of the call's other nodes
            for node in writer.nodes(call, call.state):
                for i, name in enumerate(node.input):
                    if not name or name in stored or name in own:
                        continue
                    tensor = network.constants.tensor(name)
                    if tensor is not None:
                        stored[name] = renamed(tensor, name)
                    elif name in given:
                        node.input[i] = f"given {given[name]}"
                        feeds[node.input[i]] = self._example(given[name])
                own.update(node.output)
                nodes.append(node)
        graph = helper.make_graph(
            nodes,
            "part",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                for name, value in feeds.items()
            ],
            [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(places)],
            list(stored.values()),
        )
        return helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version), feeds

    def _example(self, name: str) -> Any:
        if name not in self._network.values:
            raise CannotFold(f"{name} next to it is not a tensor")
        return self._network.values[name]
