"""The values that a diagnosis reports about each layer: facts, measures and channels."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from batchnorm.doctor.measure.layers import Array, Layer, Vectors, dead_channels
from batchnorm.doctor.measure.measurements import Measurements


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
        momentum: The weight of the new batch; None for the cumulative average.
        weight_of_old: The momentum of frameworks in which it is the weight of the old statistics; otherwise None.
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
    weight_of_old: float | None
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
class Channels(Vectors):
    """The channels of a layer; None if there is no such vector.

    Attributes:
        mean: Mean of the layer's input over all data, `[C]`.
        var: Biased variance of that input, `[C]`.
    """

    mean: Array | None = None
    var: Array | None = None


def facts_of(m: Measurements) -> tuple[LayerFacts, ...]:
    """Return the facts of every layer, in the model's order."""
    return tuple(map(_facts, m.layers))


def _facts(layer: Layer) -> LayerFacts:
    vectors, place = layer.vectors, layer.place
    return LayerFacts(
        layer.path,
        layer.paths[1:],
        layer.kind,
        layer.channels,
        "" if place is None else place.source,
        "" if place is None else place.reader,
        layer.training,
        layer.momentum,
        layer.weight_of_old,
        layer.eps,
        layer.updates,
        _range(vectors.weight),
        _range(vectors.bias),
        _range(vectors.running_mean),
        _range(vectors.running_var),
        None if vectors.weight is None else float(dead_channels(vectors.weight).mean()),
        None if place is None else place.foldable,
        layer.parameters,
        layer.buffers,
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
    of_data = (None, None) if population is None else (population.mean, population.var)
    return Channels(*vars(layer.vectors).values(), *of_data)


def _range(vector: Array | None) -> tuple[float, float] | None:
    return None if vector is None else (float(vector.min()), float(vector.max()))
