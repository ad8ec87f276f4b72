"""Rewrite functions, methods and operators as calls of one function each."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx.node import Argument, Node
from torch.nn import functional as F

import batchnorm.functional
from batchnorm import ops
from batchnorm.models.graphs.lowering.nodes import Function, is_shape, name_of, remove, replace_call

CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}

# The function for each name of operators and methods. It takes the same arguments.
_FUNCTIONS: dict[str, Function] = {
    **{f.__name__: f for f in (*CONVOLUTIONS, *TRANSPOSED)},
    **{name: getattr(F, name) for name in ("linear", "gelu", "hardtanh")},
    **{name: getattr(torch, name) for name in ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d")},
    **{name: getattr(F, name) for name in ("avg_pool2d", "avg_pool3d", "pad", "pixel_shuffle")},
    **{f"adaptive_avg_pool{n}d": getattr(F, f"adaptive_avg_pool{n}d") for n in (1, 2, 3)},
    **{
        name: getattr(torch, name)
        for name in ("cat", "flatten", "unflatten", "permute", "transpose", "movedim", "unsqueeze", "squeeze", "mean")
    },
    "reshape": torch.reshape,
    **{name: getattr(operator, name) for name in ("add", "sub", "mul")},
    **dict.fromkeys(("split", "split_with_sizes"), torch.split),
    "chunk": torch.chunk,
    "view": torch.reshape,  # `view` would fail if lowering changes the tensor's strides
    "_unsafe_view": torch.reshape,
    **dict.fromkeys(("swapaxes", "swapdims"), torch.transpose),
    "moveaxis": torch.movedim,
}
_SAME: dict[Any, Function] = {
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    **dict.fromkeys((torch.swapaxes, torch.swapdims), torch.transpose),
    torch.moveaxis: torch.movedim,
    **{getattr(F, f"max_pool{n}d"): getattr(torch, f"max_pool{n}d") for n in (1, 2, 3)},
    torch.adaptive_avg_pool1d: F.adaptive_avg_pool1d,
}
_IDENTITIES = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy")
_DROPOUTS = (
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip
_DROPOUT_FUNCTIONS = tuple(
    getattr(source, name) for source in (F, torch) for name in _DROPOUTS if hasattr(source, name)
)
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_BATCH_NORM_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def lower_call(node: Node) -> None:
    """Replace a call by that of a function that computes the same in evaluation, if one is known."""
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    name = name_of(node)
    x = args[0] if args else kwargs.get("input")
    if target in _DROPOUT_FUNCTIONS or (name in _DROPOUTS and node.op == "call_function"):
        at = 1 if target in (F.feature_alpha_dropout,) else 2
        if kwargs.get("training", kwargs.get("train", args[at] if len(args) > at else None)) is False:
            remove(node, x)  # type: ignore[arg-type]
    elif name in _IDENTITIES and isinstance(x, Node):
        remove(node, x)
    elif (name == "add" or _SAME.get(target, target) is operator.add) and 0 in args[:2]:  # sum() starts with 0 + x
        remove(node, next(a for a in args if isinstance(a, Node)))
    elif name == "batch_norm" or target is torch.batch_norm:
        y, weight, bias, running_mean, running_var, training, momentum, eps, *_ = args
        replace_call(node, F.batch_norm, y, running_mean, running_var, weight, bias, training, momentum, eps)
    elif target is F.batch_norm:
        given = _batch_norm_arguments(node)
        replace_call(node, F.batch_norm, *(given[name] for name in _BATCH_NORM))
    elif target is batchnorm.functional.batch_norm:
        _lower_own_batch_norm(node)
    elif args and (found := ops.called_activation(target, args[1:], kwargs, gradients=False)):
        replace_by_activation(node, args[0], *found)
    elif name in ("view_as", "reshape_as"):
        with node.graph.inserting_before(node):
            shape = node.graph.call_function(getattr, (args[1], "shape"))
        replace_call(node, torch.reshape, x, shape)
    elif target is getattr and args[1] == "mT":
        replace_call(node, torch.transpose, x, -2, -1)
    elif name in ("view", "reshape", "permute") and node.op == "call_method":
        as_one = len(args) == 2 and (isinstance(args[1], (tuple, list)) or is_shape(args[1]))
        sizes: Any = args[1] if as_one else args[1:]
        if not kwargs and (isinstance(sizes, Node) or not any(isinstance(size, torch.dtype) for size in sizes)):
            replace_call(node, _FUNCTIONS[name], x, sizes)
    elif name in _FUNCTIONS and not kwargs.get("alpha"):
        replace_call(node, _FUNCTIONS[name], *args, **kwargs)
    elif target in _SAME and not kwargs.get("alpha") and "out" not in kwargs:
        if _SAME[target].__module__ == "_operator":
            args, kwargs = (*args, *kwargs.values()), {}
        if not kwargs.pop("return_indices", False):
            replace_call(node, _SAME[target], *args, **{key: v for key, v in kwargs.items() if v is not None})


def _batch_norm_arguments(node: Node) -> dict[str, Any]:
    return {**_BATCH_NORM_DEFAULTS, **dict(zip(_BATCH_NORM, node.args, strict=False)), **node.kwargs}


def _lower_own_batch_norm(node: Node) -> None:
    """Replace this library's function by separate calls: normalization, addition, activation."""
    given = _batch_norm_arguments(node)
    if given["training"] and given.get("mask") is not None:
        return
    activation, residual = given.get("activation", "none"), given.get("residual")
    given["momentum"] = given["momentum"] or 0.0
    y = normalized(node, tuple(given[name] for name in _BATCH_NORM), given.get("channel_dim", 1))
    if residual is not None:
        with node.graph.inserting_before(node):
            y = node.graph.call_function(operator.add, (y, residual))
            y.meta = dict(node.meta)
    if activation == "none":
        remove(node, y)
    else:
        row = ops.ACTIVATIONS[activation]
        replace_by_activation(node, y, activation, given.get(row.parameter or "", row.default))


def normalized(node: Node, arguments: tuple[Any, ...], channel_dim: int) -> Node:
    """Insert `F.batch_norm` with these arguments before the node, for channels in this dimension; return its result."""

    def insert(function: Function, *args: Any) -> Node:
        with node.graph.inserting_before(node):
            y = node.graph.call_function(function, args)
        y.meta = dict(node.meta)
        return y

    if channel_dim == 1:
        return insert(F.batch_norm, *arguments)
    y = insert(F.batch_norm, insert(torch.movedim, arguments[0], channel_dim, 1), *arguments[1:])
    return insert(torch.movedim, y, 1, channel_dim)


# Activations -------------------------------------------------------------------------------------------------------


def function_of(activation: str) -> Function:
    """Return torch's function of an activation that this library fuses."""
    return getattr(F, activation)


def replace_by_activation(node: Node, x: Argument, activation: str, parameter: float) -> Node:
    """Replace the node by a call of torch's function for the activation."""
    parameters = () if ops.ACTIVATIONS[activation].parameter is None else (parameter,)
    return replace_call(node, function_of(activation), x, *parameters)


def activation_of(node: Node) -> tuple[str, float] | None:
    """Return the name and the parameter of an activation that this library fuses, or None for other calls."""
    if node.op != "call_function":
        return None
    return ops.called_activation(node.target, node.args[1:], node.kwargs, gradients=False)
