"""Moments of features with different numbers of values, because some are missing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Features:
    """Count (Σ w), mean and Σ w·(x - mean)² of each feature, all float64 `[C]` on the CPU.

    There are two differences from `batchnorm.moments.Moments`. Each feature has its own count, because values may be
    missing. The mean is `mean + mean_low`, because with a mean rounded to float64, each merge would make the variance
    less accurate.
    """

    count: Tensor
    mean: Tensor
    mean_low: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, features: int) -> Features:
        """Return the moments of no data."""
        zeros = torch.zeros(features, dtype=torch.float64)
        return cls(zeros, zeros, zeros, zeros)

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None, *, omit_nan: bool) -> Features:
        """Compute the moments of `x [N, C, *S]`, float64, with `weights [N]`, in two passes."""
        dims = [0, *range(2, x.dim())]
        per_feature = (1, -1, *(1,) * (x.dim() - 2))
        w = torch.ones((), dtype=x.dtype, device=x.device)
        if weights is not None:
            w = weights.reshape(-1, *(1,) * (x.dim() - 1))
        if omit_nan:
            w = w * ~x.isnan()
        w = w.expand(x.shape)
        x = torch.where(w != 0, x, 0.0)
        count = w.sum(dims)
        divisor = torch.where(count > 0, count, 1.0)
        mean = (w * x).sum(dims) / divisor
        deviation = x - mean.view(per_feature)
        mean_low = (w * deviation).sum(dims) / divisor
        m2 = (w * (deviation - mean_low.view(per_feature)).square()).sum(dims)
        return cls(count.cpu(), *_pair(mean, mean_low), m2.cpu())

    def merge(self, other: Features) -> Features:
        """Return the moments of both data sets together; see "Merging moments" on the mathematics page."""
        count = self.count + other.count
        divisor = torch.where(count > 0, count, 1.0)
        difference = (other.mean - self.mean) + (other.mean_low - self.mean_low)
        difference = torch.where((self.count > 0) & (other.count > 0), difference, 0.0)
        start = torch.where(self.count > 0, self.mean, other.mean)
        start_low = torch.where(self.count > 0, self.mean_low, other.mean_low)
        m2 = self.m2 + other.m2 + difference.square() * self.count * other.count / divisor
        return Features(count, *_pair(start, start_low + difference * other.count / divisor), m2)

    @property
    def var(self) -> Tensor:
        """The biased variance; NaN for a feature without values."""
        return self.m2 / self.count


def _pair(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rounded sum and its rounding error, on the CPU."""
    high, low = high.cpu(), low.cpu()
    total = high + low
    return total, torch.where(total.isfinite(), low - (total - high), 0.0)
