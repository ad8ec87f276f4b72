"""The facts of each layer, for tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Node

from batchnorm.doctor.measure.layers import Layer

# |γ| below which a channel is as good as its β alone.
DEAD = 1e-3


@dataclass(frozen=True)
class LayerFacts:
    """What is known of one layer without data, as plain values.

    Ranges are (smallest, largest), or None where the layer has no such vector.

    Attributes:
        path: Where it is; further places in `also`.
        also: Its other places.
        kind: Its class.
        channels: How many.
        after: What computes its input, traced; empty where that is not known.
        before: What reads its output, traced.
        training: Its mode.
        momentum: None for the cumulative average.
        eps: ε.
        updates: Batches that the running statistics have seen, where it counts them.
        weight: Range of γ.
        bias: Range of β.
        running_mean: Its range.
        running_var: Its range.
        dead: Share of channels with |γ| < 0.001; None without γ.
        foldable: Whether it can go into the layer before it; None where it is not traced.
        parameters: Number of trainable and other parameters.
        buffers: Number of values in buffers.
    """

    path: str
    also: tuple[str, ...]
    kind: str
    channels: int
    after: str
    before: str
    training: bool
    momentum: float | None
    eps: float
    updates: int | None
    weight: tuple[float, float] | None
    bias: tuple[float, float] | None
    running_mean: tuple[float, float] | None
    running_var: tuple[float, float] | None
    dead: float | None
    foldable: bool | None
    parameters: int
    buffers: int


def facts_of(layer: Layer, paths: dict[Node, str]) -> LayerFacts:
    """The facts of a layer, whose neighbours' paths are given."""
    module, place = layer.module, layer.place
    weight = getattr(module, "weight", None)
    return LayerFacts(
        layer.path,
        layer.found.paths[1:],
        type(module).__name__,
        int(getattr(module, "num_features", 0)),
        "" if place is None else _name(place.source, paths),
        "" if place is None else place.activation or ", ".join(_name(reader, paths) for reader in place.readers),
        module.training,
        getattr(module, "momentum", None),
        layer.eps,
        layer.updates,
        _range(weight),
        _range(getattr(module, "bias", None)),
        _range(getattr(module, "running_mean", None)),
        _range(getattr(module, "running_var", None)),
        (weight.detach().abs() < DEAD).double().mean().item() if isinstance(weight, Tensor) else None,
        None if place is None else place.foldable,
        sum(p.numel() for p in module.parameters(recurse=False)),
        sum(b.numel() for b in module.buffers(recurse=False)),
    )


def _name(node: Node, paths: dict[Node, str]) -> str:
    if node.op == "placeholder":
        return "the input"
    if node.op == "output":
        return "the output"
    function = str(getattr(node.target, "__name__", node.target))
    path = paths.get(node, "")
    return f"{path} ({function})" if path else function


@torch.no_grad()
def _range(vector: object) -> tuple[float, float] | None:
    if not isinstance(vector, Tensor) or vector.numel() == 0:
        return None
    return float(vector.min()), float(vector.max())
