"""Rewrite a graph so that layers, methods and operators of an exported program become calls of plain functions.

Afterwards, every convolution is a call of `F.conv2d` with its weight as an attribute of the graph, whatever the model
used. No known call changes its argument in place. Dropout, which has no effect in evaluation, is removed.
"""

from __future__ import annotations

from torch import fx

from batchnorm.models.graphs.lowering.calls import CONVOLUTIONS, TRANSPOSED, activation_of, lower_call
from batchnorm.models.graphs.lowering.in_place import mutated, out_of_place, written
from batchnorm.models.graphs.lowering.layers import lower_layer
from batchnorm.models.graphs.lowering.sizes import ask_the_source, asks_sizes, follow_the_device

__all__ = ["CONVOLUTIONS", "TRANSPOSED", "activation_of", "asks_sizes", "lower", "mutated", "written"]


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph of a model in evaluation mode, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module":
            lower_layer(module, node)
    calls = [out_of_place(node) for node in list(graph.nodes) if node.op in ("call_function", "call_method")]
    changed = mutated(graph)
    for node in calls:
        if node not in changed:
            lower_call(node)
    ask_the_source(graph)
    follow_the_device(graph)
    graph.lint()
    module.recompile()
    return module
