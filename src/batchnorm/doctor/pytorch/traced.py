"""Read the traced model: the places of its layers, and the dropout before them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import Node
from torch.nn import functional as F

from batchnorm.doctor.measure.place import Bias, Place
from batchnorm.doctor.pytorch.layers import as_array
from batchnorm.models.graphs.model_graph import Trace
from batchnorm.models.graphs.neighbours import BatchNormCall
from batchnorm.nn.followed import followers
from batchnorm.walk import has_own_forward

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


def place_of(call: BatchNormCall, trace: Trace, module: nn.Module, by_batch: bool) -> Place:
    """Return the place of a layer, from its call in the traced model.

    Args:
        call: The call.
        trace: The traced model.
        module: The layer.
        by_batch: Whether training normalizes by the batch.
    """
    weight = _weight_before(call, trace)
    readers = ", ".join(_named(reader, trace) for reader in call.readers)
    return Place(
        _named(call.source, trace),
        call.activation or readers,
        call.calls,
        call.foldable,
        call.source.op == "placeholder",
        _useless_bias(call, trace, module) if by_batch else None,
        None if weight is None else lambda: as_array(weight.flatten(2).sum(2) if weight.dim() > 2 else weight),
    )


def _named(node: Node, trace: Trace) -> str:
    if node.op in ("placeholder", "output"):
        return "the input" if node.op == "placeholder" else "the output"
    function = str(getattr(node.target, "__name__", node.target))
    path = trace.paths.get(node, "")
    return f"{path} ({function})" if path else function


def _useless_bias(call: BatchNormCall, trace: Trace, module: nn.Module) -> Bias | None:
    """Return the bias of the layer before batch normalization by the batch, which subtracts it."""
    if not call.follows_linear or call.calls > 1 or (has_own_forward(module) and not followers(module)):
        return None  # perhaps nothing subtracts the bias
    source = call.source
    if source.target is F.linear and not call.channels_last and len(trace.shapes.get(source, ())) != 2:
        return None  # its features are not the layer's channels
    bias = _tensor_of(source.args[2] if len(source.args) > 2 else source.kwargs.get("bias"), trace)
    return None if bias is None else Bias(trace.paths.get(source) or source.name, bias.numel())


def _weight_before(call: BatchNormCall, trace: Trace) -> Tensor | None:
    """Return the weight of the convolution or linear layer before it; a grouped one sees only its own channels."""
    source = call.source
    groups = source.args[6] if len(source.args) > 6 else source.kwargs.get("groups", 1)
    if not call.follows_linear or "transpose" in getattr(source.target, "__name__", "") or groups != 1:
        return None
    return _tensor_of(source.args[1] if len(source.args) > 1 else source.kwargs.get("weight"), trace)


def _tensor_of(argument: object, trace: Trace) -> Tensor | None:
    """Return an argument of a traced call if it is a parameter or buffer, else None."""
    if not isinstance(argument, Node) or argument.op != "get_attr":
        return None
    held: Any = trace.module
    for name in str(argument.target).split("."):
        held = getattr(held, name)
    return held if isinstance(held, Tensor) else None
