"""Run the part of an ONNX graph around one fold, before and after, in the model's own type and in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper
from torch import Tensor

from batchnorm.models.gate import Results, relative
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.onnx.graph import Array
from batchnorm.surgery.fold.onnx.network import OnnxNetwork
from batchnorm.surgery.fold.onnx.nodes import Writer, as_tensor, renamed
from batchnorm.surgery.fold.onnx.running import Feeds, Runner, exact, is_floating
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.search import Trial
from batchnorm.surgery.fold.states import CannotFold

# Rounding in a few operations cannot cause an error this large: the reference must define one of them differently.
IMPLAUSIBLE = 0.1


def try_plan(network: OnnxNetwork, runner: Runner, model: onnx.ModelProto, plan: FoldPlan) -> Trial:
    """Run the calls that the plan touches, before and after, on the example's values and on random ones.

    Raises:
        arithmetic.NotRepresentable: A weight is not finite in its type.
        CannotFold: They cannot be run.
    """
    touched = {*plan.states, *plan.through, *plan.gone, *map(network.writer, plan.same)}
    region = [call for call in network.calls if call in touched]
    remaining = [call for call in region if call not in plan.gone]
    before, feeds = _part(network, region, FoldPlan(network), plan.same, model)
    same = [plan.now(name) for name in plan.same]
    results = [plan.now(name) for call in remaining for name in call.results]
    after, more = _part(network, remaining, plan, [*same, *results], model)
    feeds |= more
    generator = np.random.default_rng(0)
    tried = (feeds, {name: _random(value, generator) for name, value in feeds.items()})
    try:
        own = runner.run(before, *tried)
        folded = runner.run(after, *tried)
    except Exception as error:
        raise CannotFold(f"trying it failed: {' '.join(str(error).split())[:200]}") from error
    runs = []
    for mine, new, right in zip(own, folded, exact(before, *tried) or own, strict=True):
        before_change = [mine[name] for name in plan.same]
        expected = [right[name] for name in plan.same]
        if max(map(relative, before_change, expected)) > IMPLAUSIBLE:
            expected = before_change
        runs.append(Results(before_change, [new[name] for name in same], expected))
    return Trial(runs, {name: folded[0][name] for name in results})


def _random(value: Array, generator: np.random.Generator) -> Array:
    return generator.standard_normal(value.shape).astype(value.dtype) if is_floating(value) else value


def _part(
    network: OnnxNetwork, calls: list[Call], plan: FoldPlan, outputs: Sequence[str], model: onnx.ModelProto
) -> tuple[onnx.ModelProto, Feeds]:
    """Return a model of these calls alone, as they are after a plan's change, and its inputs."""
    stored: dict[str, onnx.TensorProto] = {}
    count = iter(range(1_000_000))

    def keep(name: str, value: Tensor) -> str:
        kept = f"folded weight {next(count)}"
        stored[kept] = as_tensor(kept, value)
        return kept

    writer = Writer(network, plan, keep, lambda stem: f"{stem} {next(count)}")
    nodes = [node for call in calls for node in writer.nodes(call)]
    written = {name for node in nodes for name in node.output}
    feeds: Feeds = {}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name):
        if name in written or name in stored:
            continue
        tensor = network.constants.tensor(name)
        if tensor is not None:
            stored[name] = renamed(tensor, name)
        elif name in network.values:
            feeds[name] = network.values[name]
        else:
            raise CannotFold(f"{name} next to it is not a tensor")
    graph = helper.make_graph(
        nodes,
        "part",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(outputs)],
        list(stored.values()),
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=max(model.ir_version, 4)), feeds
