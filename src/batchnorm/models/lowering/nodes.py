"""Names of the calls in a graph, and other calls in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Argument, Node

Function = Callable[..., Any]


def name_of(node: Node) -> str:
    """Return an operator's or a method's name without the underscore of the in-place form; of a function, nothing."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target.namespace == "aten" else ""
    else:
        name = str(target) if node.op == "call_method" else ""
    return name.removesuffix("_") if not name.endswith("__") else name


def replace_call(node: Node, function: Function, *args: Argument, **kwargs: Argument) -> Node:
    """Put a call of this function in the node's place."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def remove(node: Node, result: Node) -> None:
    """Remove a node whose result is another node."""
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
