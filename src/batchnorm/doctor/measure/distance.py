"""The distance of a layer's running statistics from the population's, and between its calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from batchnorm.doctor.measure.layers import Layer, median
from batchnorm.doctor.wording import named

# Calls of a layer are different populations from this distance of the means in σ, or ratio of the deviations minus 1.
_DIFFERENT = 0.25


@dataclass(frozen=True)
class Distance:
    """Distance of a layer's running statistics from the population's.

    Attributes:
        layer: The layer.
        shift: Root mean square over the channels of (running mean - mean)/σ, minus the part that sampling explains. For
            constant channels, σ is the running σ.
        scale: Median over the channels of |ln(running σ / σ)|.
        divergence: Mean over the channels of KL(population ‖ running) for normal distributions, in nats.
        unevenness: Median over the channels of the distance of ln(running σ / σ) from its own median. Infinite for
            fewer than eight channels, because these can agree by chance.
    """

    layer: Layer
    shift: float
    scale: float
    divergence: float = math.nan
    unevenness: float = math.nan

    @property
    def matters(self) -> bool:
        """Whether the distance is larger than that of a healthy running average."""
        return self.shift > 0.25 or self.scale > 0.2

    @property
    def as_change(self) -> str:
        """The distance as a change of the data, in words."""
        return f"differ by {self.shift:.2g}σ in the mean and by a factor of {math.exp(self.scale):.2f} in σ"

    def __str__(self) -> str:
        return (
            f"{named(self.layer.path)}: running mean off by {self.shift:.2g}σ, running σ by a factor of "
            f"{math.exp(self.scale):.2f}"
        )


@np.errstate(all="ignore")
def distance_of(layer: Layer, samples: int, batch_size: float) -> Distance | None:
    """Compare running statistics and population; return None if one of them is missing."""
    population = layer.population
    if population is None or layer.running is None or len(layer.running.mean) != 1 or layer.samples is None:
        return None
    mean, var = population.mean, population.var + layer.eps
    running_mean, running_var = layer.running.mean[0], layer.running.var[0] + layer.eps
    if not bool(np.isfinite(running_mean + running_var).all()):
        return None
    # With the σ of a constant channel, √ε, every distance would be huge.
    varies = np.where(population.m2 > 0, var, running_var)
    square = np.square(running_mean - mean) / varies
    # Both the average over the last 1/a batches and the measured mean have a sampling error.
    a = min(layer.momentum or 0.0, 1.0)
    by_chance = layer.samples.error_of_mean(samples) + layer.samples.error_of_mean(batch_size) * a / (2 - a)
    shift = float(np.sqrt(np.maximum((square - by_chance / varies).mean(), 0.0)))
    ratio = np.log(var / np.maximum(running_var, 1e-30))
    divergence = 0.5 * (np.exp(ratio) + np.square(running_mean - mean) / np.maximum(running_var, 1e-30) - 1 - ratio)
    unevenness = median(np.abs(ratio - median(ratio))) / 2 if len(ratio) >= 8 else math.inf
    return Distance(layer, shift, median(np.abs(ratio)) / 2, float(divergence.mean()), unevenness)


@np.errstate(all="ignore")
def distance_of_calls(layer: Layer) -> tuple[float, float]:
    """Return the largest distance between the calls' means in σ, and the largest ratio of their σ.

    The first is the root mean square over the channels, the second the median.
    """
    means = np.stack([moments.mean for moments in layer.calls])
    deviations = np.stack([np.sqrt(moments.var + layer.eps) for moments in layer.calls])
    pooled = np.sqrt(np.square(deviations).mean(0))
    shift = np.sqrt(np.square(np.ptp(means, axis=0) / pooled).mean())
    return float(shift), median(deviations.max(0) / np.maximum(deviations.min(0), 1e-30))


def different_calls(layer: Layer) -> bool:
    """Return whether the calls of a layer have inputs from different populations."""
    shift, scale = distance_of_calls(layer)
    return shift > _DIFFERENT or scale > 1 + _DIFFERENT
