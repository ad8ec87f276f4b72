"""Test whether batches are independent samples: the spread between batches against the spread within them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    inflation: Tensor
    p: float
    permutations: int

    @property
    def rejected(self) -> bool:
        """Whether the samples of a batch resemble one another more than chance explains."""
        return self.p <= _SIGNIFICANT and len(self.inflation) > 0 and float(self.inflation.mean()) >= _INFLATED


def independence_of(values: Tensor, batch: Tensor, permutations: int = 199) -> Independence:
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
    deviation = values.std(0)
    values = (values - values.mean(0)) / deviation.where(deviation > 0, 1.0)
    values = values[:, deviation > 0]
    _, batch = batch.unique(return_inverse=True)
    sizes = batch.bincount().to(values.dtype)
    if values.shape[1] == 0 or len(sizes) < 2 or len(values) <= len(sizes):
        return Independence(torch.ones(0, device="cpu"), 1.0, 0)
    groups = torch.zeros(len(sizes), len(values), dtype=values.dtype, device="cpu")
    groups[batch, torch.arange(len(values), device="cpu")] = 1
    total = values.square().sum(0)

    def inflation(order: Tensor | None) -> Tensor:
        sums = groups @ (values if order is None else values[order])
        between = (sums.square() / sizes[:, None]).sum(0)
        within = (total - between).clamp_min(1e-12 * float(total.max()))
        return (between / (len(sizes) - 1)) / (within / (len(values) - len(sizes)))

    observed = inflation(None)
    generator = torch.Generator().manual_seed(0)
    largest = float(observed.max())
    as_large = sum(
        float(inflation(torch.randperm(len(values), generator=generator, device="cpu")).max()) >= largest
        for _ in range(permutations)
    )
    return Independence(observed, (as_large + 1) / (permutations + 1), permutations)
