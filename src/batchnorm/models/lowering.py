"""One spelling for every call: layers, methods, operators of an exported program and functions become functions.

Afterwards a convolution is a call of `F.conv2d` with its weight as an attribute of the graph, however the model had it;
nothing known changes its argument in place; and dropout, which does nothing in evaluation, is gone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Node
from torch.nn import functional as F

import batchnorm.functional
from batchnorm import ops

Function = Callable[..., Any]

CONVOLUTIONS: dict[Any, int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED: dict[Any, int] = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}

# By name, for operators and methods; the function takes the same arguments.
_FUNCTIONS: dict[str, Function] = {
    **{f.__name__: f for f in (*CONVOLUTIONS, *TRANSPOSED)},
    "linear": F.linear,
    **{name: getattr(F, name) for name in ("relu", "relu6", "silu", "gelu", "hardswish", "leaky_relu", "hardtanh")},
    **{name: getattr(torch, name) for name in ("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d")},
    **{name: getattr(F, name) for name in ("avg_pool2d", "avg_pool3d", "pad", "pixel_shuffle")},
    **{f"adaptive_avg_pool{n}d": getattr(F, f"adaptive_avg_pool{n}d") for n in (1, 2, 3)},
    **{
        name: getattr(torch, name)
        for name in ("cat", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "mean", "reshape")
    },
    **{name: getattr(operator, name) for name in ("add", "sub", "mul")},
    **dict.fromkeys(("split", "split_with_sizes"), torch.split),
    "chunk": torch.chunk,
    "view": torch.reshape,  # what is viewed may lie in memory otherwise than before
    "_unsafe_view": torch.reshape,
    "swapaxes": torch.transpose,
}
_SAME: dict[Any, Function] = {
    torch.relu: F.relu,
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    **{getattr(F, f"max_pool{n}d"): getattr(torch, f"max_pool{n}d") for n in (1, 2, 3)},
    torch.adaptive_avg_pool1d: F.adaptive_avg_pool1d,
}
_NOTHING = ("contiguous", "clone", "detach", "alias", "lift_fresh_copy")
_DROPOUTS = (
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
)  # fmt: skip
_DROPOUT_FUNCTIONS = tuple(
    getattr(source, name) for source in (F, torch) for name in _DROPOUTS if hasattr(source, name)
)

_VIEWS = {
    "getitem", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "permute", "transpose", "swapaxes",
    "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split", "unbind", "select", "narrow", "slice", "t", "T",
    "movedim", "contiguous", "detach", "alias", "diagonal", "getattr",
}  # fmt: skip

# Where the argument `inplace` stands.
_INPLACE_AT: dict[Any, int] = {
    F.relu: 1, F.relu6: 1, F.silu: 1, F.hardswish: 1, F.hardsigmoid: 1, F.mish: 1, F.selu: 1, F.elu: 2, F.celu: 2,
    F.leaky_relu: 2, F.hardtanh: 3, F.threshold: 3,
}  # fmt: skip
_INPLACE_OPERATORS: dict[Any, Function] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, torch.relu_: F.relu,
}  # fmt: skip


def lower(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite the graph of a model in evaluation mode in one spelling, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module":
            _lower_layer(module, node)
    calls = [_out_of_place(node) for node in list(graph.nodes) if node.op in ("call_function", "call_method")]
    kept = mutated(graph)
    for node in calls:
        if node not in kept:
            _lower_call(node)
    _ask_the_source(graph)
    _follow_the_device(graph)
    graph.lint()
    module.recompile()
    return module


def mutated(graph: fx.Graph) -> set[Node]:
    """The tensors that calls change in place which have no other spelling, and what these are views of."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        writes = node.target is operator.setitem or (_in_place(node) and node.op != "call_module")
        if (writes or (node in found and _is_view(node))) and node.args and isinstance(node.args[0], Node):
            found.add(node.args[0])
    return found


def replace_call(node: Node, function: Function, *args: Argument, **kwargs: Argument) -> Node:
    """A call of this function in the node's place."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(function, args, kwargs)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _remove(node: Node, stands_for: Node) -> None:
    node.replace_all_uses_with(stands_for)
    node.graph.erase_node(node)


# Layers ------------------------------------------------------------------------------------------------------------


def _plain(layer: nn.Module) -> bool:
    hooks = any(bool(held) for name, held in vars(layer).items() if "_hooks" in name and "state_dict" not in name)
    return not hooks and "forward" not in vars(layer) and not nn.utils.parametrize.is_parametrized(layer)


def _pool(function: Function, *names: str) -> Callable[[Any], tuple[Function, tuple[Any, ...]]]:
    return lambda layer: (function, tuple(getattr(layer, name) for name in names))


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_LAYERS: dict[type, Callable[[Any], tuple[Function, tuple[Any, ...]]]] = {
    nn.ReLU: _pool(F.relu),
    nn.ReLU6: _pool(F.relu6),
    nn.SiLU: _pool(F.silu),
    nn.Hardswish: _pool(F.hardswish),
    nn.Hardtanh: _pool(F.hardtanh, "min_val", "max_val"),
    nn.LeakyReLU: _pool(F.leaky_relu, "negative_slope"),
    nn.Flatten: _pool(torch.flatten, "start_dim", "end_dim"),
    nn.AvgPool1d: _pool(torch.avg_pool1d, *_AVERAGE),
    nn.AvgPool2d: _pool(F.avg_pool2d, *_AVERAGE, "divisor_override"),
    nn.AvgPool3d: _pool(F.avg_pool3d, *_AVERAGE, "divisor_override"),
    **{getattr(nn, f"MaxPool{n}d"): _pool(getattr(torch, f"max_pool{n}d"), *_MAX) for n in (1, 2, 3)},
    **{
        getattr(nn, f"AdaptiveAvgPool{n}d"): _pool(getattr(F, f"adaptive_avg_pool{n}d"), "output_size")
        for n in (1, 2, 3)
    },
}


_PADDINGS: dict[type, str] = {
    getattr(nn, f"{name}Pad{n}d"): mode
    for name, mode in (
        ("Reflection", "reflect"),
        ("Replication", "replicate"),
        ("Circular", "circular"),
        ("Zero", "constant"),
    )
    for n in (1, 2, 3)
}


def _lower_layer(module: fx.GraphModule, node: Node) -> None:
    layer: Any = module.get_submodule(str(node.target))
    x = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(x, Node) or not _plain(layer):
        return

    def tensors(*names: str) -> list[Node | None]:
        with node.graph.inserting_before(node):
            return [
                node.graph.get_attr(f"{node.target}.{name}") if getattr(layer, name) is not None else None
                for name in names
            ]

    kind = type(layer)
    dims = len(getattr(layer, "kernel_size", ())) if isinstance(getattr(layer, "kernel_size", ()), tuple) else 0
    if isinstance(layer, (nn.Identity, nn.modules.dropout._DropoutNd)):
        _remove(node, x)
    elif kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        held = tensors("running_mean", "running_var", "weight", "bias")
        replace_call(node, F.batch_norm, x, *held, layer.running_mean is None, layer.momentum or 0.0, layer.eps)
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and getattr(layer, "_uses_batch", True) is False:
        # This library's layers that find statistics in parts: one node each, and in evaluation as any other.
        held = tensors("running_mean", "running_var", "weight", "bias")
        replace_call(node, F.batch_norm, x, *held, False, 0.0, layer.eps)
    elif kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            sizes = list(layer._reversed_padding_repeated_twice)
            with node.graph.inserting_before(node):
                x, padding = node.graph.call_function(F.pad, (x, sizes, layer.padding_mode)), 0
        function = next(f for f, n in CONVOLUTIONS.items() if n == dims)
        replace_call(
            node, function, x, *tensors("weight", "bias"), layer.stride, padding, layer.dilation, layer.groups
        )  # fmt: skip
    elif kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        function = next(f for f, n in TRANSPOSED.items() if n == dims)
        replace_call(
            node, function, x, *tensors("weight", "bias"), layer.stride, layer.padding, layer.output_padding,
            layer.groups, layer.dilation,
        )  # fmt: skip
    elif kind is nn.Linear:
        replace_call(node, F.linear, x, *tensors("weight", "bias"))
    elif kind is nn.GELU:
        replace_call(node, F.gelu, x, approximate=layer.approximate)
    elif kind is nn.Upsample:
        names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
        replace_call(node, F.interpolate, x, **{name: getattr(layer, name) for name in names})
    elif kind in _PADDINGS:
        replace_call(node, F.pad, x, layer.padding, _PADDINGS[kind])
    elif kind in _LAYERS and not getattr(layer, "return_indices", False):
        function, arguments = _LAYERS[kind](layer)
        replace_call(node, function, x, *arguments)


# Calls -------------------------------------------------------------------------------------------------------------


def _name(node: Node) -> str:
    """An operator's or a method's name without the underscore of a change in place; of a function none."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = target._opname if target.namespace == "aten" else ""
    else:
        name = str(target) if node.op == "call_method" else ""
    return name.removesuffix("_") if not name.endswith("__") else name


def _in_place(node: Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if node.op == "call_method":
        return str(target).endswith("_") and not str(target).endswith("__")
    at = _INPLACE_AT.get(target, len(node.args))
    return target in _INPLACE_OPERATORS or node.kwargs.get("inplace") is True or node.args[at : at + 1] == (True,)


def _is_view(node: Node) -> bool:
    """Whether the result may share its argument's memory."""
    if isinstance(node.target, torch._ops.OpOverload):
        return any(
            result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns
        )
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _VIEWS


def _out_of_place(node: Node) -> Node:
    """The call without its change in place; whoever reads the changed tensor later reads its result."""
    written = node.args[0] if node.args else None
    target = node.target
    if node.kwargs.get("inplace") is False:
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if not _in_place(node) or not isinstance(written, Node) or _is_view(written):
        return node
    kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if isinstance(target, torch._ops.OpOverload):
        packet = getattr(torch.ops.aten, _name(node), None)
        function = getattr(packet, target._overloadname, None)
        if function is None or not str(target._opname).endswith("_"):
            return node
        new = function, node.args
    elif node.op == "call_method":
        if not hasattr(Tensor, _name(node)):
            return node
        node.target, new = _name(node), None
    elif target in _INPLACE_OPERATORS:
        new = _INPLACE_OPERATORS[target], node.args
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


def _lower_call(node: Node) -> None:
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    name = _name(node)
    x = args[0] if args else kwargs.get("input")
    if target in _DROPOUT_FUNCTIONS or (name in _DROPOUTS and node.op == "call_function"):
        at = 1 if target in (F.feature_alpha_dropout,) else 2
        if kwargs.get("training", kwargs.get("train", args[at] if len(args) > at else None)) is False:
            _remove(node, x)  # type: ignore[arg-type]
    elif name in _NOTHING and isinstance(x, Node):
        _remove(node, x)
    elif (name == "add" or _SAME.get(target, target) is operator.add) and 0 in args[:2]:  # as sum() begins
        _remove(node, next(a for a in args if isinstance(a, Node)))
    elif name == "batch_norm" or target is torch.batch_norm:
        y, weight, bias, running_mean, running_var, training, momentum, eps, *_ = args
        replace_call(node, F.batch_norm, y, running_mean, running_var, weight, bias, training, momentum, eps)
    elif target is F.batch_norm:
        _lower_batch_norm(node)
    elif target is batchnorm.functional.batch_norm:
        _lower_ours(node)
    elif name in ("view_as", "reshape_as"):
        with node.graph.inserting_before(node):
            shape = node.graph.call_function(getattr, (args[1], "shape"))
        replace_call(node, torch.reshape, x, shape)
    elif name in ("view", "reshape", "permute") and node.op == "call_method":
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if not kwargs and not any(isinstance(size, torch.dtype) for size in sizes):
            replace_call(node, _FUNCTIONS[name], x, sizes)
    elif name in _FUNCTIONS and not kwargs.get("alpha"):
        replace_call(node, _FUNCTIONS[name], *args, **kwargs)
    elif target in _SAME and not kwargs.get("alpha") and "out" not in kwargs:
        if _SAME[target].__module__ == "_operator":
            args, kwargs = (*args, *kwargs.values()), {}
        if not kwargs.pop("return_indices", False):
            replace_call(node, _SAME[target], *args, **{key: v for key, v in kwargs.items() if v is not None})


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_BATCH_NORM_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}


def _batch_norm_arguments(node: Node) -> dict[str, Any]:
    return {**_BATCH_NORM_DEFAULTS, **dict(zip(_BATCH_NORM, node.args, strict=False)), **node.kwargs}


def _lower_batch_norm(node: Node) -> None:
    given = _batch_norm_arguments(node)
    replace_call(node, F.batch_norm, *(given[name] for name in _BATCH_NORM))


def _lower_ours(node: Node) -> None:
    """This library's function in its parts: normalization, addition, activation."""
    given = _batch_norm_arguments(node)
    if given["training"] and given.get("mask") is not None:
        return
    activation, residual = given.get("activation", "none"), given.get("residual")
    given["momentum"] = given["momentum"] or 0.0
    with node.graph.inserting_before(node):
        y = node.graph.call_function(F.batch_norm, tuple(given[name] for name in _BATCH_NORM))
        y.meta = dict(node.meta)
        if residual is not None:
            y = node.graph.call_function(operator.add, (y, residual))
        if activation == "leaky_relu":
            y = node.graph.call_function(F.leaky_relu, (y, given.get("negative_slope", 0.01)))
        elif activation != "none":
            y = node.graph.call_function(getattr(F, activation), (y,))
        y.meta = dict(node.meta)
    _remove(node, y)


def activation_of(node: Node) -> tuple[str, float] | None:
    """The name and the slope of an activation that this library fuses; None for other calls."""
    target, args, kwargs = node.target, node.args[1:], node.kwargs
    if node.op != "call_function":
        return None
    if target is F.hardtanh:
        return ("relu6", 0.0) if (*args, *kwargs.values()) in ((0, 6), (0.0, 6.0)) else None
    if target is F.leaky_relu:
        return "leaky_relu", (*args, *kwargs.values(), 0.01)[0]  # type: ignore[return-value]
    if args or any(value != "none" for value in kwargs.values()):
        return None
    name = {F.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish"}.get(target)  # type: ignore[arg-type]
    return None if name is None or name not in ops.ACTIVATIONS else (name, 0.0)


def asks_sizes(node: Node) -> bool:
    """Whether the call reads its tensor's sizes, not its values."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "device")
    name = _name(node)
    return name in ("size", "dim", "sym_size", "sym_numel") or (
        node.op == "call_method" and node.target == "ndimension"
    )


def _ask_the_source(graph: fx.Graph) -> None:
    """Sizes are asked of what has the same and comes earlier, so that a call is read for its values alone."""
    same_shape = {F.batch_norm, F.relu, F.relu6, F.silu, F.gelu, F.hardswish, F.leaky_relu, F.hardtanh}
    same_rank = {*same_shape, *CONVOLUTIONS, *TRANSPOSED, F.linear}
    for node in graph.nodes:
        if not asks_sizes(node) or not isinstance(node.args[0], Node):
            continue
        rank = node.args[1:] in (("ndim",), ("device",)) or node.target in ("dim", "ndimension")
        source = node.args[0]
        while source.op == "call_function" and source.target in (same_rank if rank else same_shape):
            source = source.args[0]  # type: ignore[assignment]
        node.args = (source, *node.args[1:])


def _follow_the_device(graph: fx.Graph) -> None:
    """Tensors that the graph makes are made where its first argument is, so that the module can be moved."""
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
