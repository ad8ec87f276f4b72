"""Moments of features with different numbers of values, because some are missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import batchnorm.ops  # noqa: F401  (registers the operators)

if TYPE_CHECKING:
    from collections.abc import Callable


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
    def of(cls, x: Tensor, weights: Tensor | None) -> Features:
        """Compute the moments of `x [N, C, *S]`, float64, with `weights [N]`.

        They are not finite for a feature with a value that is not finite, or too large to be squared.
        """
        if weights is not None:
            shape = (x.shape[0], *x.shape[2:])
            weights = weights.view(-1, *(1,) * (x.dim() - 2)).expand(shape)
        count, *others = torch.ops.batchnorm.moments(x, None, weights, 1)
        return cls(count.cpu().expand(x.shape[1]), *(each.cpu() for each in others))

    @classmethod
    def of_incomplete(cls, x: Tensor, weights: Tensor | None, *, omit_nan: bool) -> Features:
        """Compute the same in plain torch operations; a value that is not finite does not make the others NaN."""
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
        return cls(count.cpu(), *_pair(mean.cpu(), mean_low.cpu()), m2.cpu())

    @classmethod
    def of_entries(cls, values: Tensor, columns: Tensor, weights: Tensor | None, features: int) -> Features:
        """Compute the moments of the entries of a sparse matrix: their values, columns and weights, all `[E]`."""
        w = torch.ones_like(values) if weights is None else weights
        total: Callable[[Tensor], Tensor] = partial(torch.bincount, columns, minlength=features)
        count = total(w)
        divisor = torch.where(count > 0, count, 1.0)
        mean = total(w * values) / divisor
        deviation = values - mean[columns]
        mean_low = total(w * deviation) / divisor
        return cls(count, *_pair(mean, mean_low), total(w * (deviation - mean_low[columns]).square()))

    @property
    def finite(self) -> Tensor:
        """The features whose moments are finite, bool `[C]`."""
        return self.mean.isfinite() & self.m2.isfinite()

    def replaced(self, features: Tensor, others: Features) -> Features:
        """Return these moments with those of some features, bool `[C]`, replaced."""
        return Features(
            *(mine.masked_scatter(features, other) for mine, other in zip(self._parts(), others._parts(), strict=True))
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.count, self.mean, self.mean_low, self.m2

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
    """Return the rounded sum and its rounding error."""
    total = high + low
    return total, torch.where(total.isfinite(), low - (total - high), 0.0)
