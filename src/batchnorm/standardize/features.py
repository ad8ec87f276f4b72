"""Moments of features with different numbers of values, because some are missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Parts = Iterable[tuple[Tensor, Tensor | None]]


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
        zeros = torch.zeros(features, dtype=torch.float64, device="cpu")
        return cls(zeros, zeros, zeros, zeros)

    @classmethod
    def of(cls, parts: Callable[[], Parts], pivot: Tensor) -> Features:
        """Compute the moments of parts of the data in one pass, as deviations from a pivot.

        If the pivot is farther from a feature's mean than its standard deviation, the difference of the sums would lose
        digits. A second pass then takes the mean as the pivot. The moments are not finite for a feature with a value
        that is not finite, or too large to be squared.

        Args:
            parts: Returns the parts: x `[N, C, *S]`, float64, which is overwritten, and the weights `[N]` or None.
            pivot: Values near the means, float64 `[C]` on the CPU.
        """
        found, precise = cls._about(parts(), pivot)
        return found if precise else cls._about(parts(), found.mean.nan_to_num(0.0, 0.0, 0.0))[0]

    @classmethod
    def _about(cls, parts: Parts, pivot: Tensor) -> tuple[Features, bool]:
        counts, sums, squares = [], [], []
        for x, weights in parts:
            dims = [0, *range(2, x.dim())]
            deviation = x.sub_(pivot.to(x.device).view(1, -1, *(1,) * (x.dim() - 2)))
            positions = x[0, 0].numel()
            if weights is None:
                counts.append(torch.tensor(float(x.shape[0] * positions), dtype=torch.float64, device="cpu"))
                sums.append(deviation.sum(dims))
                squares.append(deviation.square_().sum(dims))
            else:
                w = weights.view(-1, *(1,) * (x.dim() - 1))
                counts.append(weights.sum() * positions)
                sums.append((w * deviation).sum(dims))
                squares.append((w * deviation.square_()).sum(dims))
        count, total, square = (torch.stack(each).sum(0).cpu() for each in (counts, sums, squares))
        count = count.expand_as(pivot)
        shift = total / torch.where(count > 0, count, 1.0)
        lost = total * shift
        found = cls(count, *_pair(pivot, shift), (square - lost).clamp_min(0.0))
        return found, bool(((2 * lost <= square) | ~found.finite).all())

    @classmethod
    def of_incomplete(cls, x: Tensor, weights: Tensor | None, *, omit_nan: bool) -> Features:
        """Compute the moments of x with weights in two passes; with `omit_nan`, NaN does not count."""
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
