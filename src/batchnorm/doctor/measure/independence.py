"""Test whether batches are independent samples: the spread between batches against the spread within them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Batches count as dependent up to this p-value, and from this mean inflation over the channels.
_SIGNIFICANT, _INFLATED = 0.01, 1.5


@dataclass(frozen=True)
class Independence:
    """Analysis of variance of the samples' means, with batches as groups.

    Attributes:
        inflation: `[channels]`, mean square between batches over mean square within them: 1 for independent samples.
        p: Probability that independent samples have such a large maximum over all channels of all layers.
        permutations: Number of random orders of the samples, from which p is computed.
    """

    inflation: NDArray[np.float64]
    p: float
    permutations: int

    @property
    def rejected(self) -> bool:
        """Whether the samples of a batch resemble one another more than chance explains."""
        return self.p <= _SIGNIFICANT and len(self.inflation) > 0 and float(self.inflation.mean()) >= _INFLATED


def independence_of(values: NDArray[np.floating], batch: NDArray[np.integer], permutations: int = 199) -> Independence:
    """Test whether the samples of a batch resemble one another more than random samples do.

    The largest inflation over all channels is compared with the largest one for randomly assigned batches. This needs
    no further correction for the number of channels, and assumes no distribution.

    Args:
        values: `[samples, channels]`: the mean of each sample over its positions, from a pass in which no sample
            depends on its neighbours.
        batch: `[samples]`: the number of each sample's batch.
        permutations: Number of random orders.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing (the maximum statistic).
    """
    values = np.asarray(values, np.float64)
    values = values[:, np.ptp(values, axis=0) > 0]
    values = (values - values.mean(0)) / values.std(0)
    _, batch = np.unique(batch, return_inverse=True)
    sizes = np.bincount(batch)
    if values.shape[1] == 0 or len(sizes) < 2 or len(values) <= len(sizes):
        return Independence(np.ones(0), 1.0, 0)
    groups = np.zeros((len(sizes), len(values)))
    groups[batch, np.arange(len(values))] = 1.0
    total = np.square(values).sum(0)
    least = 1e-12 * total.max()

    def inflation(of: NDArray[np.float64]) -> NDArray[np.float64]:
        between = (np.square(of @ values) / sizes[:, None]).sum(0)
        within = np.maximum(total - between, least)
        ratio: NDArray[np.float64] = (between / (len(sizes) - 1)) / (within / (len(values) - len(sizes)))
        return ratio

    observed = inflation(groups)
    generator = np.random.default_rng(0)
    largest = observed.max()
    # Permuting the assignment to batches is cheaper than permuting the samples, which would copy all values.
    as_large = sum(inflation(generator.permutation(groups, axis=1)).max() >= largest for _ in range(permutations))
    return Independence(observed, (int(as_large) + 1) / (permutations + 1), permutations)
