"""Estimate the weight of the initial values in running statistics whose updates are not counted."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from batchnorm.doctor.measure.layers import Array, Layer, median

# Two estimates agree if neither the weight of the initial values nor that of the data differs by more than this
# factor. Data of another scale do not agree: for c times the scale, the mean gives 1/c as the weight of the data, and a
# variance above 1 gives at most 1/c². One of the factors between them, c and 1 + 1/c, is at least 1.618.
_AGREE = 1.5
# Smallest cosine of two changes that count as parallel.
_PARALLEL = 0.95
# Root mean square distance of the population's mean or variance from the initial values, in σ or σ², from which the
# weight can be measured.
_MEASURABLE = 0.05
# Fewer channels can agree by chance.
_CHANNELS = 8


@np.errstate(all="ignore")
def estimated_share(layers: Iterable[Layer]) -> float:
    """Return the weight of the initial values in layers that were updated together; 0 if there is no such weight.

    After updates with a total weight a, the running mean is a·mean and the running variance 1 + a·(var - 1), if the
    population has not changed meanwhile. Each layer gives two estimates of a. They must agree in more than half of
    the layers.

    Args:
        layers: Layers that count no updates.
    """
    estimates = [found for layer in layers if (found := _weights_of_data(layer)) is not None]
    agreeing = np.array([math.sqrt(a * b) for a, b in estimates if _agree(a, b)])
    if not len(agreeing):
        return 0.0
    common = median(agreeing)
    supporting = sum(_agree(float(each), common) for each in agreeing)
    return 1.0 - common if 2 * supporting > len(estimates) else 0.0


def _weights_of_data(layer: Layer) -> tuple[float, float] | None:
    """Return the weight of the data in the running mean and variance; None if they cannot be measured.

    The distance from the initial values to the running statistics, and from there to the population's, must be parallel
    to the whole distance; otherwise, a weight is NaN.
    """
    population, running = layer.population, layer.running
    if population is None or running is None or len(running.mean) != 1 or len(population.mean) < _CHANNELS:
        return None
    scale = np.maximum(population.var, 1.0)  # neither small nor large variances dominate
    of_mean = running.mean[0] / np.sqrt(scale), population.mean / np.sqrt(scale)
    of_var = (running.var[0] - 1.0) / scale, (population.var - 1.0) / scale
    if any(math.sqrt(np.square(whole).mean()) < _MEASURABLE for _, whole in (of_mean, of_var)):
        return None
    return _weight(*of_mean), _weight(*of_var)


def _weight(change: Array, whole: Array) -> float:
    if not (_parallel(change, whole) and _parallel(whole - change, whole)):
        return math.nan
    return float(change @ whole) / float(whole @ whole)


def _parallel(a: Array, b: Array) -> bool:
    return float(a @ b) > _PARALLEL * float(np.linalg.norm(a) * np.linalg.norm(b))


def _agree(a: float, b: float) -> bool:
    """Return whether two weights of the data between 0 and 1 are nearly the same, and those of the initial values."""
    if not (0.0 < a < 1.0 and 0.0 < b < 1.0):
        return False
    return max(a, b) <= _AGREE * min(a, b) and 1.0 - min(a, b) <= _AGREE * (1.0 - max(a, b))
