"""The values that a diagnosis reports about each layer: facts, measures and channels."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.node import Node

from batchnorm.doctor.measure.layers import Layer, dead_channels
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.walk import num_channels


@dataclass(frozen=True)
class LayerFacts:
    """The facts of one layer that are known without data.

    Ranges are (smallest, largest), or None if the layer has no such vector.

    Attributes:
        path: Its path; further paths are in `also`.
        also: Its other paths.
        kind: Its class.
        channels: Number of channels.
        after: The call that computes its input, from the trace; empty if unknown.
        before: The call that reads its output, from the trace.
        training: Whether it is in training mode.
        momentum: None for the cumulative average.
        eps: ε.
        updates: Number of batches in the running statistics; None if the layer does not count them.
        weight: Range of γ.
        bias: Range of β.
        running_mean: Range of the running mean.
        running_var: Range of the running variance.
        dead: Share of channels with |γ| < 0.001; None without γ.
        foldable: Whether it can be folded into the layer before it; None if it was not traced.
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


@dataclass(frozen=True)
class LayerMeasures:
    """The measures of one layer from the data; None if one could not be taken.

    Attributes:
        path: Its path.
        order: Its number in the order of the calls, from 0.
        shift: Root mean square over the channels of (running mean - mean)/σ, minus the part that sampling explains. For
            constant channels, σ is the running σ.
        log_scale: Median over the channels of |ln(running σ / σ)|.
        divergence: Mean over the channels of KL(population ‖ running) for normal distributions, in nats: the distance
            between the statistics of evaluation and those of training.
        noise: Standard deviation, in σ, of a normalized value when the other samples of its batch vary, for the median
            channel, at the batch size of the data. It falls as one over the square root of the batch size.
    """

    path: str
    order: int | None = None
    shift: float | None = None
    log_scale: float | None = None
    divergence: float | None = None
    noise: float | None = None


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a layer, as float32 copies on the CPU; None if there is no such vector.

    Attributes:
        weight: γ.
        bias: β.
        running_mean: `[C]`, or `[K, C]` if the layer has several.
        running_var: The same shape.
        mean: Mean of the layer's input over all data, `[C]`.
        var: Biased variance of that input, `[C]`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def facts_of(m: Measurements) -> tuple[LayerFacts, ...]:
    """Return the facts of every layer, in the model's order."""
    paths = {} if m.trace is None else m.trace.paths
    return tuple(_facts(layer, paths) for layer in m.layers)


def _facts(layer: Layer, paths: dict[Node, str]) -> LayerFacts:
    module, place = layer.module, layer.place
    weight = getattr(module, "weight", None)
    return LayerFacts(
        layer.path,
        layer.found.paths[1:],
        type(module).__name__,
        num_channels(module) or 0,
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
        dead_channels(weight).double().mean().item() if isinstance(weight, Tensor) else None,
        None if place is None else place.foldable,
        sum(p.numel() for p in module.parameters(recurse=False)),
        sum(b.numel() for b in module.buffers(recurse=False)),
    )


def measures_of(m: Measurements) -> tuple[LayerMeasures, ...]:
    """Return the measures of every layer, in the model's order."""
    distances = {distance.layer: distance for distance in m.distances}

    def measures(layer: Layer) -> LayerMeasures:
        order = None if layer.order == sys.maxsize else layer.order
        distance, noise = distances.get(layer), m.noise.get(layer.path)
        if distance is None:
            return LayerMeasures(layer.path, order, noise=noise)
        return LayerMeasures(layer.path, order, distance.shift, distance.scale, distance.divergence, noise)

    return tuple(measures(layer) for layer in m.layers)


def channels_of(layer: Layer) -> Channels:
    """Return the channels of a layer."""
    population = layer.population
    of_module = (getattr(layer.module, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
    of_data = (None, None) if population is None else (population.mean, population.var)
    return Channels(*(_copy(vector) for vector in (*of_module, *of_data)))


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


@torch.no_grad()
def _copy(vector: object) -> Tensor | None:
    if not isinstance(vector, Tensor) or vector.numel() == 0:
        return None
    return vector.detach().to("cpu", torch.float32, copy=True)
