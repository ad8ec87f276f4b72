"""Folds an ONNX model in place, and compares the whole with the original."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import onnx
import torch
from onnx import TensorProto

from batchnorm.models.report import Change
from batchnorm.surgery.fold import gate
from batchnorm.surgery.fold.network import Shape
from batchnorm.surgery.fold.onnx.emit import emit
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array, opset_version, subgraphs
from batchnorm.surgery.fold.onnx.inputs import feeds_of
from batchnorm.surgery.fold.onnx.network import NORM, OnnxNetwork
from batchnorm.surgery.fold.onnx.running import CannotRun, Feeds, Outputs, Runner, exact, is_floating
from batchnorm.surgery.fold.onnx.trial import try_plan
from batchnorm.surgery.fold.report import FoldError, FoldReport
from batchnorm.surgery.fold.search import Search

OLDEST = 7  # before, batch normalization and addition were written otherwise


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
    network = OnnxNetwork(model, values, shapes)
    limit = gate.tolerance_for(tolerance, _dtypes(model))
    changed, left = _fold(network, limit, runner, model)
    emit(network, model)
    try:
        found = runner.run(model, *runs, plain=plain)
    except Exception as error:
        raise FoldError(f"the folded model must run, but: {error}. Please report the model.") from error
    errors = _error(own, found, right)
    gate.check_whole(errors, limit)
    inner = [_left_inside(where, node) for where, node in _norms(model) if where]
    return FoldReport(
        "fold",
        tuple(changed),
        (*left, *inner),
        how=runner.how,
        error=errors.after,
        error_before=errors.before,
        before=total,
        remaining=sum(1 for _ in _norms(model)),
        notes=notes,
    )


def _fold(
    network: OnnxNetwork, limit: float, runner: Runner, model: onnx.ModelProto
) -> tuple[list[Change], list[Change]]:
    """Fold the network. Return what became of every batch normalization: the folded ones and the others."""
    search = Search(network, limit, partial(try_plan, network, runner, model))
    was = {call: f"{NORM}({norm.channels})" for call, norm in network.norms.items()}
    search.fold_all()
    changed, left = [], []
    for call in network.calls:
        if call in search.taken:
            into = ", ".join(dict.fromkeys(place.name for place in search.taken[call]))
            changed.append(Change(call.name, was[call], f"in {into}"))
        elif call.op == NORM:
            left.append(Change.unchanged(call.name, was.get(call, NORM), search.reasons.get(call, "")))
    return changed, left


# The whole model ---------------------------------------------------------------------------------------------------


def _norms(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Every batch normalization, and the body or function that it is in; "" for the main graph."""

    def of(nodes: Any, where: str) -> Iterator[tuple[str, onnx.NodeProto]]:
        for node in nodes:
            if node.op_type == NORM and node.domain in ("", "ai.onnx"):
                yield where, node
            for body in subgraphs(node):
                yield from of(body.node, f"the body of {node.op_type} {node.name or node.output[0]}")

    yield from of(model.graph.node, "")
    for function in model.functions:
        yield from of(function.node, f"the function {function.name}")


def _left_inside(where: str, node: onnx.NodeProto) -> Change:
    return Change(node.name or node.output[0], NORM, NORM, f"it is in {where}, which is not looked into")


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


def _dtypes(model: onnx.ModelProto) -> list[torch.dtype]:
    """Return the dtypes of the results and of what batch normalizations read."""
    read = {name for where, node in _norms(model) if not where for name in node.input}
    kinds = {t.data_type for t in model.graph.initializer if t.name in read}
    kinds |= {value.type.tensor_type.elem_type for value in model.graph.output}
    return [DTYPES.get(kind, torch.float32) for kind in kinds - {TensorProto.UNDEFINED}]


def _error(own: list[Outputs], folded: list[Outputs], exact: list[Outputs]) -> gate.Error:
    names = [(run, name) for run, outputs in enumerate(exact) for name in outputs if is_floating(outputs[name])]
    return gate.Error.of(gate.Results(*([runs[run][name] for run, name in names] for runs in (own, folded, exact))))
