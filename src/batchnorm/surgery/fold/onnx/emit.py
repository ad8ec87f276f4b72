"""Write the folded model in place of the original."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import onnx
from onnx import TensorProto, helper
from torch import Tensor

from batchnorm.surgery.fold.network import Call, Kind
from batchnorm.surgery.fold.onnx.graph import every_name, names_in, subgraphs
from batchnorm.surgery.fold.onnx.network import OnnxNetwork
from batchnorm.surgery.fold.onnx.nodes import as_tensor
from batchnorm.surgery.fold.states import NewConstants

_SMALL = 1024  # bytes; computed constants up to this size are stored


def emit(network: OnnxNetwork, model: onnx.ModelProto) -> None:
    """Turn the model of this network into the folded one. Names, versions and metadata stay."""
    graph, constants = model.graph, network.constants
    taken = set(every_name(model))
    before = _names(graph.node)
    changed = any(call.gone or call.state is not None for call in network.calls)
    calls, new = _evaluated(network, _needed(network)) if changed else (_needed(network), {})
    still = _read_by(calls)
    stored = {tensor.name for tensor in graph.initializer}

    def fresh(stem: str) -> str:
        name = next(n for i in itertools.count(1) if (n := stem if i == 1 else f"{stem}_{i}") not in taken)
        taken.add(name)
        stored.add(name)
        return name

    def store(name: str, value: Tensor) -> str:
        """Store a tensor under its own name, or under a new name if other calls still read the old value."""
        if name in new or name in still or (name not in stored and constants.tensor(name) is None):
            name = fresh(f"{name}_folded")
        new[name] = as_tensor(name, value)
        return name

    writer = network.nodes_writer(store, fresh)
    nodes = [node for call in calls if call.kind is not Kind.OUTPUT for node in writer.nodes(call, call.state)]
    read = _names(nodes) | {output.name for output in graph.output}
    kept = [t for t in graph.initializer if t.name not in new and (t.name in read or t.name not in before)]
    removed = {t.name for t in graph.initializer} - {t.name for t in kept} - set(new)
    del graph.node[:]
    graph.node.extend(nodes)
    tensors = {t.name: t for t in (*kept, *new.values())}
    _replace(graph, tensors)
    _inputs(graph, new, removed, model.ir_version)
    written = {name for node in nodes for name in node.output} | set(tensors)
    infos = [info for info in graph.value_info if info.name in written]
    del graph.value_info[:]
    graph.value_info.extend(infos)


def _names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the names that the nodes and their bodies read."""
    read = {name for node in nodes for name in node.input}
    return read | {name for node in nodes for body in subgraphs(node) for name in names_in(body)}


def _needed(network: OnnxNetwork) -> list[Call]:
    """Return the calls, without calls that compute constants that are no longer read."""
    calls = [call for call in network.calls if not call.gone]
    while True:
        read = _read_by(calls)
        kept = [c for c in calls if read.intersection(c.results) or not _is_constant(network, c)]
        if len(kept) == len(calls):
            return calls
        calls = kept


def _evaluated(network: OnnxNetwork, calls: list[Call]) -> tuple[list[Call], dict[str, TensorProto]]:
    """Return the calls without those that compute small constants, and these constants by their names.

    Runtimes fuse an operator such as Clip only if its bounds are stored. Exporters compute them in the type of x.
    """
    results = set(calls[-1].inputs)
    found: dict[str, TensorProto] = {}
    for call in calls:
        name = call.results[0] if call.results else ""
        if call.state is not None or name in results or not _is_constant(network, call) or call.node.op == "Constant":
            continue
        tensor = network.constants.tensor(name)
        if tensor is not None and tensor.ByteSize() <= _SMALL:
            stored = TensorProto()
            stored.CopyFrom(tensor)
            stored.name = name
            found[name] = stored
    calls = [call for call in calls if not found.keys() & set(call.results)]
    read = _read_by(calls)
    calls = [c for c in calls if read.intersection(c.results) or not _is_constant(network, c)]
    return calls, {name: tensor for name, tensor in found.items() if name in read}


def _is_constant(network: OnnxNetwork, call: Call) -> bool:
    return bool(call.results) and network.constants.tensor(call.results[0]) is not None


def _read_by(calls: Iterable[Call]) -> set[str]:
    """Return the names that the calls read, without constants that they read with new values."""
    read: set[str] = set()
    for call in calls:
        replaced = call.state.values if isinstance(call.state, NewConstants) else ()
        read |= {*call.inputs, *call.captured} - set(replaced)
    return read


def _replace(graph: onnx.GraphProto, tensors: dict[str, TensorProto]) -> None:
    """Change the initializers in place: the whole list may be too large to copy."""
    for i in reversed(range(len(graph.initializer))):
        name = graph.initializer[i].name
        if name not in tensors:
            del graph.initializer[i]
        elif graph.initializer[i] is not tensors[name]:
            graph.initializer[i].CopyFrom(tensors[name])
    there = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend([tensor for name, tensor in tensors.items() if name not in there])


def _inputs(graph: onnx.GraphProto, new: dict[str, TensorProto], removed: set[str], ir_version: int) -> None:
    """Update the inputs. Before version 4 of the format they list every initializer."""
    infos = {name: helper.make_tensor_value_info(name, t.data_type, t.dims) for name, t in new.items()}
    listed = {value.name for value in graph.input}
    for i in reversed(range(len(graph.input))):
        name = graph.input[i].name
        if name in removed:
            del graph.input[i]
        elif name in infos:
            graph.input[i].CopyFrom(infos[name])
    if ir_version < 4:
        graph.input.extend([info for name, info in infos.items() if name not in listed])
