"""Fold an ONNX model in place, and compare the whole with the original."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto

from batchnorm._options import as_clause
from batchnorm.models import gate
from batchnorm.models.execution.progress import Bar
from batchnorm.models.report import FLOAT64, Change, FoldError, FoldReport
from batchnorm.surgery.fold.moves import Shape
from batchnorm.surgery.fold.onnx.emit import emit
from batchnorm.surgery.fold.onnx.graph import DTYPES, Array, opset_version, subgraphs
from batchnorm.surgery.fold.onnx.inputs import feeds_of
from batchnorm.surgery.fold.onnx.network import NORM, OnnxNetwork
from batchnorm.surgery.fold.onnx.proof import OnnxProof
from batchnorm.surgery.fold.onnx.running import CannotRun, Feeds, Outputs, Runner, exact, is_floating
from batchnorm.surgery.fold.search import Search

OLDEST = 7  # earlier versions write batch normalization and addition differently


def fold_in_place(model: onnx.ModelProto, inputs: Any, tolerance: float | None, shown: Bar) -> FoldReport:
    """Turn the model into the folded one, and show the progress.

    Raises:
        ValueError: The model cannot be run.
        FoldError: The folded model's results are not the original's.
    """
    notes = _inline(model)
    total = sum(1 for _ in _norms(model))
    if total and opset_version(model) < OLDEST:
        raise ValueError(
            f"fold_onnx expects a model of version {OLDEST} of ONNX's operators or later, got {opset_version(model)}. "
            "Convert it with onnx.version_converter.convert_version."
        )
    try:
        runner = Runner(model)
    except CannotRun as error:
        raise ValueError(
            f"fold_onnx expects a model that ONNX Runtime can run, because it checks every fold, but: "
            f"{as_clause(error)}. Make sure that onnxruntime.InferenceSession loads the model."
        ) from error
    if total == 0:
        return FoldReport("fold", how=runner.how, notes=notes)
    shown.during("running the original")
    runs = feeds_of(model, inputs, runner)
    plain = False  # with ONNX Runtime's optimizations, as users run it
    try:
        own = runner.run(model, *runs, plain=plain)
    except Exception:  # they break some models
        plain = True
        own = runner.run(model, *runs, plain=plain)
    right, reference = exact(model, *runs), FLOAT64
    if right is None:  # then the original's error is the effect of ONNX Runtime's optimizations
        right = runner.run(model, *runs)
        reference = "the original in its own type, without optimizations (in float64 it fails or is slow)"
    values, shapes = _everything(model, runs, runner)
    network = OnnxNetwork(model, values, shapes)
    limit = gate.tolerance_for(tolerance, _dtypes(model))
    search = Search(network, OnnxProof(OnnxNetwork(model, values, shapes), limit, shown, runner, model))
    search.fold_all()
    places = {call: call.node.name for call in network.calls if call.results}
    changed, left = search.rows(places, dict.fromkeys(network.calls, NORM), {})
    shown.during("checking the result")
    emit(network, model)
    try:
        found = runner.run(model, *runs, plain=plain)
    except Exception as error:
        raise FoldError(f"the folded model must run, but: {as_clause(error)}. Please report the model.") from error
    errors = _error(own, found, right)
    gate.check_whole(errors, limit, reference)
    inner = [
        Change(node.name or node.output[0], NORM, NORM, f"it is in {where}, which is not searched")
        for where, node in _norms(model)
        if where
    ]
    return FoldReport(
        "fold",
        tuple(changed),
        (*left, *inner),
        how=runner.how,
        error=errors.after,
        error_before=errors.before,
        reference=reference,
        before=total,
        remaining=sum(1 for _ in _norms(model)),
        notes=notes,
    )


# The whole model ---------------------------------------------------------------------------------------------------


def _norms(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """Yield every batch normalization with the body or function that it is in; "" for the main graph."""

    def of(nodes: Any, where: str) -> Iterator[tuple[str, onnx.NodeProto]]:
        for node in nodes:
            if node.op_type == NORM and node.domain in ("", "ai.onnx"):
                yield where, node
            for body in subgraphs(node):
                yield from of(body.node, f"the body of {node.op_type} {node.name or node.output[0]}")

    yield from of(model.graph.node, "")
    for function in model.functions:
        yield from of(function.node, f"the function {function.name}")


def _inline(model: onnx.ModelProto) -> tuple[str, ...]:
    """Inline the model's functions if one contains batch normalization. Return a note if so."""
    if not any(where.startswith("the function") for where, _ in _norms(model)):
        return ()
    from onnx.inliner import inline_local_functions

    try:
        model.CopyFrom(inline_local_functions(model))
    except Exception:  # the model is too large for it
        return ()
    return ("functions are inlined",)


def _everything(model: onnx.ModelProto, runs: list[Feeds], runner: Runner) -> tuple[dict[str, Array], dict[str, Shape]]:
    """Return the value of every tensor of the main graph in the first run, and the shapes in all runs."""
    outputs = model.graph.output
    count, known = len(outputs), {output.name for output in outputs}
    names = [name for node in model.graph.node if node.op_type != "Constant" for name in node.output if name]
    outputs.extend([onnx.ValueInfoProto(name=name) for name in names if name not in known])
    try:
        found = runner.run(model, *runs)
    finally:
        del outputs[count:]
    found = [{**runner.convert(feeds), **results} for feeds, results in zip(runs, found, strict=True)]
    values = {name: value for name, value in found[0].items() if hasattr(value, "shape")}
    shapes: dict[str, Shape] = {}
    for name in values:
        each = [getattr(results[name], "shape", None) for results in found]
        if all(shape is not None and len(shape) == np.ndim(found[0][name]) for shape in each):
            shapes[name] = tuple(zip(*each, strict=True))
    return values, shapes


def _dtypes(model: onnx.ModelProto) -> list[torch.dtype]:
    """Return the dtypes of the results and of the inputs of batch normalizations."""
    read = {name for where, node in _norms(model) if not where for name in node.input}
    kinds = {t.data_type for t in model.graph.initializer if t.name in read}
    kinds |= {value.type.tensor_type.elem_type for value in model.graph.output}
    return [DTYPES.get(kind, torch.float32) for kind in kinds - {TensorProto.UNDEFINED}]


def _error(own: list[Outputs], folded: list[Outputs], exact: list[Outputs]) -> gate.Error:
    names = [(run, name) for run, outputs in enumerate(exact) for name in outputs if is_floating(outputs[name])]
    return gate.Error.of(gate.Results(*([runs[run][name] for run, name in names] for runs in (own, folded, exact))))
