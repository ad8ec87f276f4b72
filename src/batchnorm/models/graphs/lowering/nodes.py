"""Find the name of a call in a graph, and replace or remove a call."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Argument, Node

Function = Callable[..., Any]


def name_of(node: Node) -> str:
    """Return the name of an operator or method, without the underscore of the in-place form; "" for a function."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target.namespace == "aten" else ""
    else:
        name = str(target) if node.op == "call_method" else ""
    return name.removesuffix("_") if not name.endswith("__") else name


def replace_call(node: Node, function: Function, *args: Argument, **kwargs: Argument) -> Node:
    """Replace the node by a call of this function."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def remove(node: Node, result: Node) -> None:
    """Remove a node, and let its readers read `result`."""
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def is_shape(value: object) -> bool:
    """Return whether the value is a node that gives a tuple of sizes: a shape, a part of one, or a sum of these."""
    if not isinstance(value, Node):
        return False
    if value.target is getattr or (value.op == "call_method" and value.target == "size"):
        return value.args[1:] in ((), ("shape",)) and not value.kwargs
    if value.target is operator.getitem:
        return is_shape(value.args[0]) and isinstance(value.args[1], slice)
    return value.target is operator.add and any(map(is_shape, value.args))
