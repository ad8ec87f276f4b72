"""Which layers are given what dropout has thinned out, as the traced model shows."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn
from torch.fx.node import Node
from torch.nn import functional as F

_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def dropped(module: fx.GraphModule, layers: Collection[nn.Module]) -> dict[nn.Module, float]:
    """Of layers between which and a dropout no other layer stands, its largest share, where that is above 0.

    Args:
        module: As traced, with its layers as calls of modules.
        layers: Which to look at.
    """
    found: dict[nn.Module, float] = {}
    share: dict[Node, float] = {}
    for node in module.graph.nodes:
        before = max((share[given] for given in node.all_input_nodes), default=0.0)
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if called in layers and called is not None:
            if before > 0:
                found[called] = max(found.get(called, 0.0), before)
            before = 0.0
        share[node] = max(before, _share(node, called))
    return found


def _share(node: Node, called: nn.Module | None) -> float:
    if isinstance(called, nn.modules.dropout._DropoutNd):
        return called.p
    if node.op == "call_function" and node.target in _FUNCTIONS:
        share = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
        return float(share) if isinstance(share, (int, float)) else 0.0
    return 0.0
