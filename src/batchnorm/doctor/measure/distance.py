"""The distance of a layer's running statistics from the population's, and between its calls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from batchnorm.doctor.measure.layers import Layer
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


def distance_of(layer: Layer, samples: int, batch_size: float) -> Distance | None:
    """Compare running statistics and population; return None if one of them is missing."""
    population = layer.population
    if population is None or layer.running is None or len(layer.running.mean) != 1 or layer.samples is None:
        return None
    mean, var = population.mean, population.var + layer.eps
    running_mean, running_var = layer.running.mean[0], layer.running.var[0] + layer.eps
    if not bool((running_mean + running_var).isfinite().all()):
        return None
    # With the σ of a constant channel, √ε, every distance would be huge.
    varies = torch.where(population.m2 > 0, var, running_var)
    square = (running_mean - mean).square() / varies
    # Both the average over the last 1/a batches and the measured mean have a sampling error.
    a = min(layer.momentum or 0.0, 1.0)
    by_chance = layer.samples.error_of_mean(samples) + layer.samples.error_of_mean(batch_size) * a / (2 - a)
    shift = float((square - by_chance / varies).mean().clamp_min(0).sqrt())
    ratio = (var / running_var.clamp_min(1e-30)).log()
    divergence = 0.5 * (ratio.exp() + (running_mean - mean).square() / running_var.clamp_min(1e-30) - 1 - ratio)
    unevenness = (ratio - ratio.median()).abs().median() / 2 if len(ratio) >= 8 else math.inf
    return Distance(layer, shift, float(ratio.abs().median() / 2), float(divergence.mean()), float(unevenness))


def distance_of_calls(layer: Layer) -> tuple[float, float]:
    """Return the largest distance between the calls' means in σ, and the largest ratio of their σ.

    The first is the root mean square over the channels, the second the median.
    """
    means = torch.stack([moments.mean for moments in layer.calls])
    deviations = torch.stack([(moments.var + layer.eps).sqrt() for moments in layer.calls])
    pooled = deviations.square().mean(0).sqrt()
    shift = ((means.amax(0) - means.amin(0)) / pooled).square().mean().sqrt()
    return float(shift), float((deviations.amax(0) / deviations.amin(0).clamp_min(1e-30)).median())


def different_calls(layer: Layer) -> bool:
    """Return whether the calls of a layer have inputs from different populations."""
    shift, scale = distance_of_calls(layer)
    return shift > _DIFFERENT or scale > 1 + _DIFFERENT
