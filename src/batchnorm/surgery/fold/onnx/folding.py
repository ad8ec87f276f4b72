"""Every batch normalization of a model, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import torch
from onnx import TensorProto

from batchnorm.models.report import Change
from batchnorm.surgery.fold.arithmetic import NotRepresentable
from batchnorm.surgery.fold.onnx import branches
from batchnorm.surgery.fold.onnx.emit import emit
from batchnorm.surgery.fold.onnx.inputs import feeds_of
from batchnorm.surgery.fold.onnx.network import DTYPES, Array, Call, Network, Shape, opset_version, subgraphs
from batchnorm.surgery.fold.onnx.plans import Plan, norm_of
from batchnorm.surgery.fold.onnx.running import CannotRun, Feeds, Outputs, Runner, exact, is_floating
from batchnorm.surgery.fold.onnx.verify import difference, try_plan
from batchnorm.surgery.fold.pytorch.verify import TOLERANCE, Error
from batchnorm.surgery.fold.report import FoldError, FoldReport
from batchnorm.surgery.fold.states import CannotFold

# A whole network may amplify what each fold rounds: beyond this multiple of its own error, something else is wrong.
AMPLIFIED = 10.0
OLDEST = 7  # before, batch normalization and addition were written otherwise
_NORM = "BatchNormalization"


def fold_in_place(model: onnx.ModelProto, inputs: Any, tolerance: float | None) -> FoldReport:
    """Turn the model into the folded one.

    Raises:
        ValueError: It cannot be run.
        FoldError: The folded model's results are not the original's.
    """
    notes = _inline(model)
    total = sum(1 for _ in _norms(model))
    if total and opset_version(model) < OLDEST:
        raise ValueError(
            f"the model must be of version {OLDEST} of ONNX's operators or later, got {opset_version(model)}. Convert "
            "it with onnx.version_converter.convert_version."
        )
    try:
        runner = Runner(model)
    except CannotRun as error:
        raise ValueError(f"the model must run in ONNX Runtime, which folding is checked with, but: {error}") from error
    if total == 0:
        return FoldReport("fold", how=runner.how, notes=notes)
    runs, _ = feeds_of(model, inputs, runner)
    plain = False  # with ONNX Runtime's optimizations, as users run it
    try:
        own = runner.run(model, *runs, plain=plain)
    except Exception:  # they break some models
        plain = True
        own = runner.run(model, *runs, plain=plain)
    right = exact(model, *runs)
    if right is None:  # how far ONNX Runtime's optimizations change the result is what it errs by, then
        right = runner.run(model, *runs)
        notes = (*notes, "compared with the original in its own type: there is no float64 for some of its operators")
    values, shapes = _everything(model, runs, runner)
    network = Network(model, values, shapes)
    limit = tolerance if tolerance is not None else max(_tolerances(model), default=1e-5)
    changed, left = _fold(network, limit, runner, model)
    emit(network, model)
    try:
        found = runner.run(model, *runs, plain=plain)
    except Exception as error:
        raise FoldError(f"the folded model must run, but: {error}. Please report the model.") from error
    errs = Error(_worst(own, right), _worst(found, right))
    if not errs.after <= AMPLIFIED * max(limit, errs.before):
        raise FoldError(
            f"the folded model must give the original's results, but errs by {errs.after:.1e} where the original "
            f"itself errs by {errs.before:.1e}. Nothing was changed; please report the model."
        )
    inner = [_left_inside(where, node) for where, node in _norms(model) if where]
    return FoldReport(
        "fold",
        tuple(changed),
        (*left, *inner),
        how=runner.how,
        error=errs.after,
        error_before=errs.before,
        before=total,
        remaining=sum(1 for _ in _norms(model)),
        notes=notes,
    )


def _fold(network: Network, limit: float, runner: Runner, model: onnx.ModelProto) -> tuple[list[Change], list[Change]]:
    norms = [call for call in network.calls if call.op == _NORM]
    reasons: dict[Call, str] = {}
    taken: dict[Call, list[Call]] = {}

    def carry_out(plan: Plan) -> list[Call]:
        error, values = try_plan(plan, runner, model)
        if not error.allowed(limit):
            raise CannotFold(f"folding it errs by {error.after:.1e}, and the layer itself by {error.before:.1e}")
        plan.carry_out(values)
        return plan.where

    def fold_norms() -> bool:
        before = len(taken)
        for call in norms:
            if call in network.gone:
                continue
            why = []
            for direction in (Plan.back, Plan.on):
                try:
                    taken[call] = carry_out(direction(network, call))
                    break
                except (CannotFold, NotRepresentable) as error:
                    why.append(str(error))
            else:
                reasons[call] = "; ".join(dict.fromkeys(why))
        return len(taken) > before

    def merge_branches() -> bool:
        before = len(network.gone)
        for call in network.calls:
            if call.op != "Add" or call in network.gone:
                continue
            try:
                plan = branches.merged(network, call)
                carry_out(plan)
            except (CannotFold, NotRepresentable):
                continue
            merged = set(plan.gone)
            for norm, where in taken.items():
                taken[norm] = [call if each in merged else each for each in where]
            taken.update({each: [call] for each in plan.gone if each.op == _NORM})
        return len(network.gone) > before

    while fold_norms() | merge_branches():
        pass
    sizes = {call: _channels(network, call) for call in norms}
    changed = [
        Change(call.name, sizes[call], f"in {', '.join(dict.fromkeys(each.name for each in taken[call]))}")
        for call in norms
        if call in taken
    ]
    left = [Change(c.name, sizes[c], sizes[c], reasons.get(c, "")) for c in norms if c not in taken]
    return changed, left


def _channels(network: Network, call: Call) -> str:
    try:
        return f"{_NORM}({norm_of(network, call).scale_shift.scale.numel()})"
    except CannotFold:
        return _NORM


# The whole model ---------------------------------------------------------------------------------------------------


def _norms(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Every batch normalization, and the body or function that it is in; "" for the main graph."""

    def of(nodes: Any, where: str) -> Iterator[tuple[str, onnx.NodeProto]]:
        for node in nodes:
            if node.op_type == _NORM and node.domain in ("", "ai.onnx"):
                yield where, node
            for body in subgraphs(node):
                yield from of(body.node, f"the body of {node.op_type} {node.name or node.output[0]}")

    yield from of(model.graph.node, "")
    for function in model.functions:
        yield from of(function.node, f"the function {function.name}")


def _left_inside(where: str, node: onnx.NodeProto) -> Change:
    return Change(node.name or node.output[0], _NORM, _NORM, f"it is in {where}, which is not looked into")


def _inline(model: onnx.ModelProto) -> tuple[str, ...]:
    """Write out functions where one holds batch normalization."""
    if not any(where.startswith("the function") for where, _ in _norms(model)):
        return ()
    from onnx.inliner import inline_local_functions

    try:
        model.CopyFrom(inline_local_functions(model))
    except Exception:  # larger than it takes
        return ()
    return ("functions are written out, where they are called",)


def _everything(model: onnx.ModelProto, runs: list[Feeds], runner: Runner) -> tuple[dict[str, Array], dict[str, Shape]]:
    """The value of every tensor of the main graph in the first run, and the shapes in all."""
    outputs = model.graph.output
    there, count = {output.name for output in outputs}, len(outputs)
    names = [name for node in model.graph.node if node.op_type != "Constant" for name in node.output if name]
    outputs.extend([onnx.ValueInfoProto(name=name) for name in names if name not in there])
    try:
        found = runner.run(model, *runs)
    finally:
        del outputs[count:]
    found = [{**runner.convert(feeds), **results} for feeds, results in zip(runs, found, strict=True)]
    shapes: dict[str, Shape] = {}
    for name, value in found[0].items():
        each = [getattr(results[name], "shape", None) for results in found]
        if all(shape is not None and len(shape) == len(each[0] or ()) for shape in each):
            shapes[name] = tuple(zip(*(shape for shape in each if shape is not None), strict=True))
        del value
    return {name: value for name, value in found[0].items() if hasattr(value, "shape")}, shapes


def _tolerances(model: onnx.ModelProto) -> list[float]:
    """For the types of the batch normalizations' parameters."""
    read = {name for where, node in _norms(model) if not where for name in node.input}
    kinds = {t.data_type for t in model.graph.initializer if t.name in read}
    kinds |= {value.type.tensor_type.elem_type for value in model.graph.output}
    dtypes = [DTYPES.get(kind, torch.float32) for kind in kinds - {TensorProto.UNDEFINED}]
    return [TOLERANCE[dtype] for dtype in dtypes]


def _worst(found: list[Outputs], right: list[Outputs]) -> float:
    pairs = [(a[name], b[name]) for a, b in zip(found, right, strict=True) for name in a]
    return max((difference(a, b) for a, b in pairs if is_floating(a) and is_floating(b)), default=0.0)
