"""One fold, run before and after on the same values, in the model's own type and in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor

from batchnorm.surgery.fold.onnx.network import Array, Call
from batchnorm.surgery.fold.onnx.plans import Plan
from batchnorm.surgery.fold.onnx.running import Feeds, Runner, exact, is_floating
from batchnorm.surgery.fold.onnx.states import State, Writer, as_tensor, renamed, write
from batchnorm.surgery.fold.pytorch.verify import Error, relative
from batchnorm.surgery.fold.states import CannotFold

# A few operations do not err by this much: the reference means something else by one of them.
IMPLAUSIBLE = 0.1


def try_plan(plan: Plan, runner: Runner, model: onnx.ModelProto) -> tuple[Error, dict[str, Array]]:
    """The fold's error on the example's values and on random ones, and the values that it changes.

    Raises:
        arithmetic.NotRepresentable: A weight is not finite in its type.
        CannotFold: It cannot be run.
    """
    network = plan.network
    writers = [network.writer(name) for name in plan.same]
    touched = {*plan.states, *plan.through, *plan.gone, *(call for call in writers if call is not None)}
    region = sorted(touched, key=lambda call: call.index)
    after_calls = [call for call in region if call not in plan.gone]
    before, feeds = _part(plan, region, network.states, {}, plan.same, model)
    states = {**network.states, **plan.states}
    same = [network.resolve(name, plan.alias) for name in plan.same]
    results = [network.resolve(name, plan.alias) for call in after_calls for name in call.node.output if name]
    after, more = _part(plan, after_calls, states, plan.alias, [*same, *results], model)
    feeds |= more
    generator = np.random.default_rng(0)
    tried = (feeds, {name: _random(value, generator) for name, value in feeds.items()})
    try:
        own = runner.run(before, *tried)
        folded = runner.run(after, *tried)
    except Exception as error:
        raise CannotFold(f"trying it failed: {' '.join(str(error).split())[:200]}") from error
    wide = exact(before, *tried) or own
    errors = []
    pairs = list(zip(plan.same, same, strict=True))
    for mine, new, right in zip(own, folded, wide, strict=True):
        before_errs = max(difference(mine[name], right[name]) for name, _ in pairs)
        if not before_errs <= IMPLAUSIBLE:
            before_errs, right = 0.0, mine
        errors.append(Error(before_errs, max(difference(new[now], right[name]) for name, now in pairs)))
    changed = {name: folded[0][name] for name in results}
    return max(errors, key=lambda e: e.after - 2.0 * e.before), changed


def difference(found: Array, right: Array) -> float:
    """`max|found - right| / max|right|`; infinite where the shapes are not the same."""
    if found.shape != right.shape:
        return float("inf")
    return relative(*(torch.from_numpy(np.asarray(a, np.float64)) for a in (found, right)))


def _random(value: Array, generator: np.random.Generator) -> Array:
    return generator.standard_normal(value.shape).astype(value.dtype) if is_floating(value) else value


def _part(
    plan: Plan, calls: list[Call], states: Mapping[Call, State], alias: Mapping[str, str], outputs: list[str],
    model: onnx.ModelProto,
) -> tuple[onnx.ModelProto, Feeds]:  # fmt: skip
    """A model of these calls alone, and what it is to be given."""
    network = plan.network
    stored: dict[str, onnx.TensorProto] = {}
    count = iter(range(1_000_000))

    def keep(name: str, value: Tensor) -> str:
        kept = f"folded weight {next(count)}"
        stored[kept] = as_tensor(kept, value)
        return kept

    to = Writer(lambda name: network.resolve(name, alias), keep, lambda stem: f"{stem} {next(count)}", network.opset)
    nodes = [node for call in calls for node in write(call, states.get(call), to)]
    written = {name for node in nodes for name in node.output}
    feeds: Feeds = {}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name):
        if name in written or name in stored:
            continue
        tensor = network.tensor(name)
        if tensor is not None:
            stored[name] = renamed(tensor, name)
        elif name in network.values:
            feeds[name] = network.values[name]
        else:
            raise CannotFold(f"{name} next to it is no tensor")
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
