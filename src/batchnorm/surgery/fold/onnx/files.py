"""ONNX files: read whole, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from batchnorm.files import whole_file
from batchnorm.surgery.fold.onnx.graph import subgraphs

LARGE = 2**31 - 2**22  # what one file can hold, with room for all that is not weights


def tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every constant of the model."""

    def of_nodes(nodes: object) -> Iterator[TensorProto]:
        for node in nodes:  # type: ignore[attr-defined]
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
            for graph in subgraphs(node):
                yield from of_graph(graph)

    def of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        yield from of_nodes(graph.node)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether it does not fit into one file."""
    return sum(len(tensor.raw_data) for tensor in tensors(model)) > LARGE


def data_files(model: onnx.ModelProto) -> set[str]:
    """The files that hold its weights, relative to its own; from a model that was read without them."""
    held = [entry for t in tensors(model) if uses_external_data(t) for entry in t.external_data]
    return {entry.value for entry in held if entry.key == "location"}


def read(path: Path) -> tuple[onnx.ModelProto, bool]:
    """The model with all its weights, and whether they were in files of their own.

    Raises:
        Exception: It is none, or incomplete.
    """
    model = onnx.load_model(path, load_external_data=False)
    if not model.HasField("graph"):
        raise ValueError("it holds no graph")
    external = bool(data_files(model))
    if external:
        load_external_data_for_model(model, str(path.parent))
    return model, external


def store(model: onnx.ModelProto, path: Path, *, external: bool, data: str = "model.onnx.data") -> None:
    """Write the model, and its weights into a file beside it if `external`; the model itself keeps them."""
    if external:
        onnx.save_model(model, path, save_as_external_data=True, location=data)
        load_external_data_for_model(model, str(path.parent))
    else:
        onnx.save_model(model, path)


def write(model: onnx.ModelProto, output: Path, *, external: bool) -> None:
    """Write the model in the place of what is there, if anything, which stays whole until the new one is.

    Weights in a file of their own get a name that nothing has yet, so that the old model keeps its own until the new
    one takes its place in one step.

    Raises:
        OSError: It cannot be written; then everything is as it was.
    """
    external = external or is_large(model)
    data = _free_name(output) if external else ""
    before = _own_data(output)
    try:
        with whole_file(output) as part:
            store(model, part, external=external, data=data)
            if external and (part.parent / data).exists():
                os.replace(part.parent / data, output.parent / data)
    except BaseException:
        if external:
            (output.parent / data).unlink(missing_ok=True)
        raise
    for name in before:
        with contextlib.suppress(OSError):
            (output.parent / name).unlink()


def _free_name(output: Path) -> str:
    names = (f"{output.name}.data" if i == 1 else f"{output.name}.{i}.data" for i in range(1, 10_000))
    return next(name for name in names if not (output.parent / name).exists())


def _own_data(output: Path) -> set[str]:
    """The files beside an earlier result that hold its weights, and that have the names `write` gives."""
    try:
        held = data_files(onnx.load_model(output, load_external_data=False))
    except Exception:  # there is none, or it is something else
        return set()
    own = re.compile(re.escape(output.name) + r"(\.\d+)?\.data")
    return {name for name in held if own.fullmatch(name)}
