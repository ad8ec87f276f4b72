"""Find calls that change their argument in place, and replace them with out-of-place calls."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.models.graphs.lowering.nodes import Function, name_of, replace_call

_VIEWS = {
    "getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes",
    "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "unbind", "select", "narrow", "slice", "t", "T",
    "movedim", "moveaxis", "contiguous", "detach", "alias", "diagonal", "getattr",
}  # fmt: skip
_IN_PLACE_FUNCTIONS: dict[Any, Function] = {
    **{  # torch.clamp_, F.elu_ and so on
        function: getattr(room, name[:-1])
        for room in (torch, F)
        for name, function in vars(room).items()
        if name.endswith("_") and not name.startswith("_") and callable(getattr(room, name[:-1], None))
    },
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, torch.relu_: F.relu,
}  # fmt: skip


def _position_of_inplace() -> dict[Any, int]:
    """Return the position of the argument `inplace` in each function of `torch.nn.functional` that has it."""
    positions = {}
    for function in vars(F).values():
        if inspect.isfunction(function):
            parameters = list(inspect.signature(function).parameters)
            if "inplace" in parameters:
                positions[function] = parameters.index("inplace")
    return positions


_INPLACE_AT = _position_of_inplace()


def mutated(graph: fx.Graph) -> set[Node]:
    """Return the tensors that calls still change in place, and the tensors that they are views of."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        found.update(written(node))
        if node in found and _is_view(node) and isinstance(node.args[0], Node):
            found.add(node.args[0])
    return found


def written(node: Node) -> set[Node]:
    """Return the tensors that a call changes in place."""
    if node.op == "call_module":
        return set()
    writes = node.target is operator.setitem or _in_place(node)
    found: set[Node] = set()
    fx.map_arg((node.args[:1] if writes else (), node.kwargs.get("out")), found.add)
    return found


def _in_place(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    at = _INPLACE_AT.get(target, len(node.args))
    return (
        target in _IN_PLACE_FUNCTIONS
        or _is_named_in_place(target)
        or node.kwargs.get("inplace") is True
        or node.args[at : at + 1] == (True,)
    )


def _is_named_in_place(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _is_view(node: Node) -> bool:
    """Return whether the result may share its argument's memory."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(
            result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns
        )
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _VIEWS


def out_of_place(node: Node) -> Node:
    """Replace an in-place call by an out-of-place one, and let later readers of its argument read its result."""
    written = node.args[0] if node.args else None
    target = node.target
    if node.kwargs.get("inplace") is False:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if not _in_place(node) or not isinstance(written, Node) or _is_view(written):
        return node
    kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, name_of(node), None)
        function = getattr(packet, target._overloadname, None)
        if function is None or not str(target._opname).endswith("_"):
            return node
        new = function, node.args
    elif node.op == "call_method":
        if not hasattr(Tensor, name_of(node)):
            return node
        node.target, new = name_of(node), None
    elif target in _IN_PLACE_FUNCTIONS:
        new = _IN_PLACE_FUNCTIONS[target], node.args
    elif _is_named_in_place(target):  # without a known form that is not in place
        return node
    else:
        new = target, node.args[: _INPLACE_AT.get(target, len(node.args))]
    later, seen = [], False
    for other in node.graph.nodes:
        if seen and written in other.all_input_nodes:
            later.append(other)
        seen = seen or other is node
    for other in later:
        other.replace_input_with(written, node)
    return node if new is None else replace_call(node, new[0], *new[1], **kwargs)
