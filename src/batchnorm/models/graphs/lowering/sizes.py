"""Calls that read a tensor's sizes or device, and not its values."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm import ops
from batchnorm.models.graphs.lowering.calls import CONVOLUTIONS, TRANSPOSED, function_of
from batchnorm.models.graphs.lowering.nodes import name_of

_SAME_SHAPE = {F.batch_norm, F.hardtanh, F.gelu, *(function_of(name) for name in ops.ACTIVATIONS if name != "none")}
_SAME_RANK = {*_SAME_SHAPE, *CONVOLUTIONS, *TRANSPOSED, F.linear}


def asks_sizes(node: Node) -> bool:
    """Return whether the call reads its tensor's sizes, but not its values."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device", "dtype")
    name = name_of(node)
    return name in ("size", "dim", "numel", "nelement", "sym_size", "sym_numel") or (
        node.op == "call_method" and node.target == "ndimension"
    )


def ask_the_source(graph: fx.Graph) -> None:
    """Read sizes from an earlier tensor with the same sizes, so that results are read only for their values."""
    for node in graph.nodes:
        if not asks_sizes(node) or not isinstance(node.args[0], Node):
            continue
        rank = node.args[1:] in (("ndim",), ("device",), ("dtype",)) or node.target in ("dim", "ndimension")
        source = node.args[0]
        while source.op == "call_function" and source.target in (_SAME_RANK if rank else _SAME_SHAPE):
            source = source.args[0]  # type: ignore[assignment]
        node.args = (source, *node.args[1:])


def follow_the_device(graph: fx.Graph) -> None:
    """Create the graph's new tensors on the device of its first argument, so that the module can be moved."""
    first = next((node for node in graph.nodes if node.op == "placeholder"), None)
    device: Node | None = None
    for node in list(graph.nodes):
        fixed = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.device)]
        if not fixed or first is None:
            continue
        if device is None:
            with graph.inserting_after(next(n for n in reversed(graph.nodes) if n.op == "placeholder")):
                device = graph.call_function(getattr, (first, "device"))
        node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        node.kwargs = {key: device if isinstance(a, torch.device) else a for key, a in node.kwargs.items()}
