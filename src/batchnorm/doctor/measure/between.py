"""Whether batches are drawn independently: the spread between batches against that within them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spread:
    """Analysis of variance of the samples' means, batches as groups.

    Attributes:
        inflation: `[channels]`, mean square between batches over that within them: 1 for independent samples.
        p: That the largest of them comes from independent samples, over all channels of all layers together.
        permutations: From so many random orders of the samples.
    """

    inflation: Tensor
    p: float
    permutations: int


def between_batches(values: Tensor, batch: Tensor, permutations: int = 199) -> Spread:
    """Test whether the samples of a batch are more alike than samples are.

    The largest inflation over all channels is compared with the same of samples put into batches at random, so the
    number of channels needs no further correction, and no distribution is assumed.

    Args:
        values: `[samples, channels]`, each a sample's mean over its positions, computed without its neighbours.
        batch: `[samples]`, the number of each sample's batch.
        permutations: How many random orders.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing (the maximum statistic).
    """
    deviation = values.std(0)
    values = (values - values.mean(0)) / deviation.where(deviation > 0, 1.0)
    values = values[:, deviation > 0]
    _, batch = batch.unique(return_inverse=True)
    sizes = batch.bincount().to(values.dtype)
    if values.shape[1] == 0 or len(sizes) < 2 or len(values) <= len(sizes):
        return Spread(torch.ones(0), 1.0, 0)
    groups = torch.zeros(len(sizes), len(values), dtype=values.dtype)
    groups[batch, torch.arange(len(values))] = 1
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
        float(inflation(torch.randperm(len(values), generator=generator)).max()) >= largest for _ in range(permutations)
    )
    return Spread(observed, (as_large + 1) / (permutations + 1), permutations)
