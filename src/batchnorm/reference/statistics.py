"""Statistics per channel: computed, averaged over batches, and merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from batchnorm.reference.layout import Array, divisor, float64, layout_of, require, shaped, weights_of

# name: whether momentum is the weight of the new batch, and whether running_var takes the unbiased variance.
CONVENTIONS = {
    "torch": (True, True),
    "keras": (False, False),
    "flax": (False, False),
    "keras2_fused": (False, True),
}


def moments(
    x: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    index: ArrayLike | None = None,
    groups: int | None = None,
    axis: int = 1,
) -> Moments:
    """Return count, mean and sum of squared deviations of each channel, or of each channel in each group.

        V₁ = Σ w    μ = Σ w·x / V₁    M2 = Σ w·(x − μ)²

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 1 and 2; section 3.2 for sums over positions. Section 4.

    Args:
        x: `[N, C, *S]`.
        weights: `[N, *S]`, >= 0, the weight of each value. Default 1. Values with weight 0 may be NaN.
        index: `[N]`, the group of each sample, in [0, groups).
        groups: K. By default, there is one group, and results are `[C]`.
        axis: The channel axis of x.
    """
    x = float64(x)
    layout = layout_of(x, axis, index)
    fits = groups is None if layout.index is None else groups is not None and (layout.index < groups).all()
    came = f"index {layout.index}, groups {groups}"
    require(fits, "index and groups must be given together, index < groups", came, "groups is their number.")
    w = weights_of(weights, layout)
    x = np.where(w > 0, x, 0.0)
    rows = () if groups is None else (groups,)
    one, channels = np.zeros((*rows, 1)), np.zeros((*rows, x.shape[axis]))

    count, count_squares = layout.total(w, like=one), layout.total(w * w, like=one)
    mean = layout.total(w * x, like=channels) / divisor(count)
    # A second sum removes the rounding error of the first, so that the deviations of a constant channel are exactly 0.
    mean = mean + layout.total(w * (x - layout.spread(mean)), like=channels) / divisor(count)
    m2 = layout.total(w * (x - layout.spread(mean)) ** 2, like=channels)
    return Moments(count[..., 0], mean, m2, count_squares[..., 0])


def update_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    batch: Moments,
    *,
    momentum: float | None,
    convention: str,
    num_batches_tracked: ArrayLike = 0,
) -> Running:
    """Return the running statistics after an update by a batch.

        r ← (1 − a)·r + a·s    a = momentum in torch, 1 − momentum in Keras and Flax

    running_mean averages μ. running_var averages the unbiased variance in torch, and the biased one in Keras 3 and
    Flax. With momentum=None, a = 1/(num_batches_tracked + 1), which gives the cumulative average. Empty batches
    (m = 0) change nothing.
    Source: section 2; Ioffe & Szegedy 2015, section 3.1, for the unbiased variance.

    Args:
        running_mean: `[C]` or `[K, C]`.
        running_var: Like `running_mean`.
        batch: `Forward.batch`.
        momentum: In [0, 1], or None.
        convention: torch, keras, flax or keras2_fused. There is no default, because 0.1 in one is 0.9 in another.
        num_batches_tracked: `[]` or `[K]`, the number of batches before this one.

    Raises:
        ValueError: the update needs the unbiased variance of a single value.

    Examples:
        >>> batch = moments([[1.0], [3.0]])  # mean 2; variance 1 biased, 2 unbiased
        >>> update_running([0.0], [1.0], batch, momentum=0.25, convention="torch")[:2]
        (array([0.5]), array([1.25]))
        >>> update_running([0.0], [1.0], batch, momentum=0.75, convention="keras")[:2]
        (array([0.5]), array([1.]))
    """
    require(convention in CONVENTIONS, f"convention must be one of {[*CONVENTIONS]}", convention, "Choose one.")
    require(momentum is None or 0 <= momentum <= 1, "momentum must be in [0, 1]", momentum, "Or pass None.")
    of_new_batch, unbiased = CONVENTIONS[convention]
    old_mean = shaped("running_mean", running_mean, batch.mean.shape)
    old_var = shaped("running_var", running_var, batch.mean.shape)
    moves = batch.count > 0
    tracked = np.asarray(np.asarray(num_batches_tracked, dtype=np.int64) + moves)
    cumulative = 1 / np.maximum(tracked, 1)
    rate = cumulative if momentum is None else momentum if of_new_batch else 1 - momentum
    a = np.where(moves, rate, 0.0)[..., None]
    var = batch.var_unbiased if unbiased else batch.var
    return Running((1 - a) * old_mean + a * batch.mean, (1 - a) * old_var + a * var, tracked)


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of all parts together; skip empty parts.

        n = Σ nₖ    μ = Σ nₖ·μₖ / n    M2 = Σ M2ₖ + Σ nₖ·(μₖ − μ)²

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances". Section 4.
    """
    require(len(parts) > 0, "merge needs at least one part", 0, "Pass a list of Moments.")
    n = np.stack([part.count for part in parts])[..., None]
    mean_k = np.where(n > 0, np.stack([part.mean for part in parts]), 0.0)
    m2_k = np.where(n > 0, np.stack([part.m2 for part in parts]), 0.0)
    count = n.sum(0)
    # Differences from one of the means keep the precision of means far from 0, and equal means exactly equal.
    pivot = np.take_along_axis(mean_k, n.argmax(0)[None], axis=0)[0]
    mean = pivot + (n * (mean_k - pivot)).sum(0) / divisor(count)
    m2 = m2_k.sum(0) + (n * (mean_k - mean) ** 2).sum(0)
    return Moments(count[..., 0], mean, m2, np.sum([part.count_squares for part in parts], axis=0))


def ghost_index(x: ArrayLike, size: int, *, axis: int = 1) -> NDArray[np.intp]:
    """Return `[N]`, the ghost batch of each sample. Ghost batches are parts of `size` consecutive samples.

    The last part may be smaller. If it has a single value per channel, it joins the part before it.
    Source: Hoffer, Hubara & Soudry 2017, Algorithm 1. Section 4, "Ghost batches".
    """
    x = float64(x)
    samples, values = x.shape[1 if axis == 0 else 0], x.size // max(x.shape[axis], 1)
    index = np.arange(samples) // size
    if samples > size and samples % size == 1 and values == samples:
        index[-1] -= 1
    return index


def pool(parts: Moments) -> Moments:
    """Return the moments for one update by ghost batches, from the moments `[K, C]` of all parts.

        mean = Σ mₖ·μₖ / Σ mₖ    unbiased variance = Σ M2ₖ / Σ(mₖ − 1)

    This omits the variance between parts, because training does not see it. The count is n/K with n = Σ mₖ. With
    weights, V₁ₖ·V₁ₖ/V₂ₖ replaces mₖ. Source: section 4, "Ghost batches".
    """
    n, n_squares = parts.count.sum(), parts.count_squares
    share = (parts.count / divisor(n))[:, None]
    # Without weights, this is the number of parts, because each part loses one degree of freedom.
    lost = np.asarray(np.sum(n_squares / divisor(parts.count)))
    count = n / divisor(lost)
    mean, var = (share * parts.mean).sum(0), (share * parts.var).sum(0)
    return Moments(np.asarray(count), mean, var * count, np.asarray(count))


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations, which determine the variance and can be merged.

    Attributes:
        count: V₁ = Σw, `[]` or `[K]`; without weights, the number m of values per channel.
        mean: μ, `[C]` or `[K, C]`; 0 if nothing was counted.
        m2: Σ w·(x − μ)², like `mean`.
        count_squares: V₂ = Σw², like `count`; equal to it without weights or with a mask of 0 and 1.
    """

    count: Array
    mean: Array
    m2: Array
    count_squares: Array

    @property
    def var(self) -> Array:
        """σ² = M2/V₁, the biased variance, used to normalize."""
        return np.asarray(self.m2 / divisor(self.count)[..., None])

    @property
    def var_unbiased(self) -> Array:
        """σ²·V₁²/(V₁² − V₂), or without weights σ²·m/(m − 1). Sections 2 and 4."""
        self.require_several()
        return np.asarray(self.var * (self.count**2 / divisor(self.count**2 - self.count_squares))[..., None])

    def require_several(self) -> None:
        """Raise a ValueError if a single value was counted, because it has no variance."""
        single = (self.count > 0) & (self.count**2 - self.count_squares <= 1e-12 * self.count**2)
        require(
            not single.any(),
            "A batch variance needs more than one value per channel",
            f"count = {np.asarray(self.count).tolist()}",
            "Use a larger batch, or normalize by running statistics.",
        )


class Running(NamedTuple):
    """Running statistics: mean and var `[C]` or `[K, C]`, num_batches_tracked `[]` or `[K]`."""

    mean: Array
    var: Array
    num_batches_tracked: NDArray[np.int64]
