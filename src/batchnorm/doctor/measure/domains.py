"""Find out whether batches come from several domains in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
from numpy.typing import NDArray

from batchnorm.doctor.measure.independence import independence_of
from batchnorm.doctor.measure.layers import Array

Numbers = NDArray[np.integer]

# Largest number of domains that are distinguished.
_MOST = 4
# Batches of one domain vary at most by this share of the variation of all batches.
_INSIDE = 0.05


@dataclass(frozen=True)
class Domains:
    """Batches that come from several domains in turn, and are independent samples of their domain.

    Attributes:
        of_batches: The domain of each batch, from 0.
        distances: The largest distance between the domains' means, by the layer's path: the root mean square over the
            channels, in the standard deviation of the samples' means within a domain.
    """

    of_batches: tuple[int, ...]
    distances: Mapping[str, float]

    @property
    def number(self) -> int:
        """The number of domains."""
        return 1 + max(self.of_batches)


def domains_of(values: Mapping[str, Array], batch: Numbers) -> Domains | None:
    """Divide the batches into domains; return None if they do not come from a few domains in turn.

    A group of batches that are not independent samples is divided in two, at the largest gap between the means of its
    batches, in the direction in which these means vary most. Each domain must occur at least twice, with others in
    between. Data that are sorted by class do not meet this condition.

    Args:
        values: `[samples, channels]` for each layer: the mean of each sample over its positions.
        batch: `[samples]`: the number of each sample's batch.
    """
    _, batch = np.unique(batch, return_inverse=True)
    joined = np.concatenate(list(values.values()), 1)
    joined = joined[:, np.ptp(joined, axis=0) > 0]
    joined = (joined - joined.mean(0)) / joined.std(0)
    means = np.stack([joined[batch == number].mean(0) for number in range(int(batch.max()) + 1)])
    waiting: list[Numbers] = [np.arange(len(means))]
    found: list[Numbers] = []
    most = float(independence_of(joined, batch, permutations=0).inflation.mean())
    while waiting:
        group = waiting.pop()
        inside = np.isin(batch, group)
        test = independence_of(joined[inside], batch[inside])
        if not test.rejected or float(test.inflation.mean()) < _INSIDE * most:
            found.append(group)
            continue
        parts = _divided(group, means)
        if min(map(len, parts)) < 2 or len(waiting) + len(found) + 2 > _MOST:
            return None
        waiting += parts
    if len(found) < 2:
        return None
    found.sort(key=lambda group: int(group.min()))
    numbers = {int(number): domain for domain, group in enumerate(found) for number in group}
    of_batches = tuple(numbers[number] for number in range(len(means)))
    runs = [domain for domain, _ in groupby(of_batches)]
    if min(runs.count(domain) for domain in range(len(found))) < 2:
        return None
    domain = np.array(of_batches)[batch]
    return Domains(of_batches, {path: _distance(of_layer, domain) for path, of_layer in values.items()})


def _divided(group: Numbers, means: Array) -> list[Numbers]:
    """Divide a group of batches at the largest gap between their means, along the first principal component."""
    of_group = means[group] - means[group].mean(0)
    position = of_group @ np.linalg.svd(of_group, full_matrices=False)[2][0]
    order = position.argsort()
    cut = 1 + int(np.diff(position[order]).argmax())
    return [np.sort(group[order[:cut]]), np.sort(group[order[cut:]])]


def _distance(values: Array, domain: Numbers) -> float:
    groups = [values[domain == number] for number in range(int(domain.max()) + 1)]
    varies = np.any([np.ptp(group, axis=0) > 0 for group in groups], axis=0)
    if not varies.any():
        return 0.0
    within = np.mean([group[:, varies].var(0, ddof=1) for group in groups], axis=0)
    pairs = combinations([group[:, varies].mean(0) for group in groups], 2)
    return max(float(np.sqrt((np.square(a - b) / within).mean())) for a, b in pairs)
