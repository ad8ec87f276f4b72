"""Rewrite layers as calls of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm import ops
from batchnorm.foreign import FOLLOWERS, foreign_eps
from batchnorm.models.graphs.lowering.calls import CONVOLUTIONS, TRANSPOSED, normalized, replace_by_activation
from batchnorm.models.graphs.lowering.nodes import Function, remove, replace_call


def _with_attributes(function: Function, *names: str) -> Callable[[Any], tuple[Function, tuple[Any, ...]]]:
    return lambda layer: (function, tuple(getattr(layer, name) for name in names))


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_LAYERS: dict[type, Callable[[Any], tuple[Function, tuple[Any, ...]]]] = {
    nn.Hardtanh: _with_attributes(F.hardtanh, "min_val", "max_val"),
    nn.Flatten: _with_attributes(torch.flatten, "start_dim", "end_dim"),
    nn.AvgPool1d: _with_attributes(torch.avg_pool1d, *_AVERAGE),
    nn.AvgPool2d: _with_attributes(F.avg_pool2d, *_AVERAGE, "divisor_override"),
    nn.AvgPool3d: _with_attributes(F.avg_pool3d, *_AVERAGE, "divisor_override"),
    **{getattr(nn, f"MaxPool{n}d"): _with_attributes(getattr(torch, f"max_pool{n}d"), *_MAX) for n in (1, 2, 3)},
    **{
        getattr(nn, f"AdaptiveAvgPool{n}d"): _with_attributes(getattr(F, f"adaptive_avg_pool{n}d"), "output_size")
        for n in (1, 2, 3)
    },
}
_BATCH_NORM = ("running_mean", "running_var", "weight", "bias")
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


def _is_plain(layer: nn.Module) -> bool:
    """Return whether the layer computes the same as its class: no hooks, and the `forward` of the class."""
    hooks = any(bool(held) for name, held in vars(layer).items() if "_hooks" in name and "state_dict" not in name)
    return not hooks and "forward" not in vars(layer) and not nn.utils.parametrize.is_parametrized(layer)


def _call_after(node: Node, target: str) -> Node:
    """Call a module with the node's result, which all its readers then read."""
    with node.graph.inserting_after(node):
        called = node.graph.call_module(target, (node,))
    called.meta = dict(node.meta)
    node.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)
    return called


def lower_layer(module: fx.GraphModule, node: Node) -> None:
    """Replace the call of a known layer by the call of its function."""
    layer: Any = module.get_submodule(str(node.target))
    x = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(x, Node) or not _is_plain(layer):
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
        remove(node, x)
    elif kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        held = tensors(*_BATCH_NORM)
        replace_call(node, F.batch_norm, x, *held, layer.running_mean is None, layer.momentum or 0.0, layer.eps)
    elif isinstance(layer, nn.modules.batchnorm._NormBase) and getattr(layer, "_uses_batch", True) is False:
        # This library's layers with statistics by parts are one node each, and plain normalization in evaluation.
        held = tensors(*_BATCH_NORM)
        remove(node, normalized(node, (x, *held, False, 0.0, layer.eps), getattr(layer, "channel_dim", 1)))
    elif (eps := foreign_eps(layer)) is not None:
        followed = [f"{node.target}.{name}" for name in FOLLOWERS if name in layer._modules]
        last = replace_call(node, F.batch_norm, x, *tensors(*_BATCH_NORM), False, 0.0, eps)
        for target in followed:
            last = _call_after(last, target)
            lower_layer(module, last)
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
    elif found := ops.module_activation(layer):
        replace_by_activation(node, x, *found)
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
