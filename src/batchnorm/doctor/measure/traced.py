"""Read the traced model: the layers whose input comes from dropout, and the tensors of a call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.models.graphs.model_graph import Trace

_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def dropout_before(module: fx.GraphModule, layers: Collection[nn.Module]) -> dict[nn.Module, float]:
    """Return the layers with dropout before them and no other of the layers between, with its largest probability.

    Args:
        module: The traced model, with its layers as calls of modules.
        layers: Layers to look at.
    """
    found: dict[nn.Module, float] = {}
    probability: dict[Node, float] = {}
    for node in module.graph.nodes:
        before = max((probability[source] for source in node.all_input_nodes), default=0.0)
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if called in layers and called is not None:
            if before > 0:
                found[called] = max(found.get(called, 0.0), before)
            before = 0.0
        probability[node] = max(before, _probability(node, called))
    return found


def _probability(node: Node, called: nn.Module | None) -> float:
    if isinstance(called, nn.modules.dropout._DropoutNd):
        return called.p
    if node.op == "call_function" and node.target in _FUNCTIONS:
        p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        return float(p) if isinstance(p, (int, float)) else 0.0
    return 0.0


def tensor_of(argument: object, trace: Trace) -> Tensor | None:
    """Return an argument of a traced call if it is a parameter or buffer, else None."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    held: Any = trace.module
    for name in str(argument.target).split("."):
        held = getattr(held, name)
    return held if isinstance(held, Tensor) else None
