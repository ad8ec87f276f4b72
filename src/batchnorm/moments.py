"""Count, mean and squared deviations per channel: computed from data, and merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from batchnorm._frameworks import required_by

with required_by("batchnorm.moments"):
    import torch
    from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

Data: TypeAlias = "Tensor | NDArray[Any]"

# The number of values that are converted to float64 at a time. No array is copied whole, and each part stays in cache.
_PART = 2**18


@dataclass(frozen=True, eq=False)
class Moments:
    """Mergeable count, mean and sum of squared deviations of each channel; immutable, float64.

    `mean = Σ w·x / Σ w` and `m2 = Σ w·(x - mean)²`, with `w = 1` unless there are weights.

    Args:
        count: Σ w, a scalar; without weights, the number m of values per channel.
        mean: μ, `[C]`; ignored if nothing was counted.
        m2: Σ w·(x - μ)², `[C]`.
        count_squares: Σ w², a scalar, needed for the unbiased variance of weighted values; None if all weights are 0
            or 1.

    Raises:
        ValueError: shapes do not agree.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances";
        the equations are on the mathematics page, "Merging moments".

    Examples:
        >>> first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])
        >>> both = Moments.of(first).merge(Moments.of(second))
        >>> both.count.item(), both.mean.item(), both.var.item(), both.var_unbiased.item()
        (3.0, 3.0, 4.666..., 7.0)
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    count_squares: Tensor | None = None

    def __post_init__(self) -> None:
        mean = self.mean if isinstance(self.mean, Tensor) else torch.as_tensor(self.mean)  # keeps a tensor's device
        for name in ("count", "mean", "m2", "count_squares"):
            value = getattr(self, name)
            if value is None:
                continue
            value = torch.as_tensor(value, dtype=torch.float64, device=mean.device).detach()
            wanted = mean.shape[:1] if name in ("mean", "m2") else ()
            if value.shape != wanted or mean.dim() != 1:
                raise ValueError(
                    f"Moments expects {name} of shape {list(wanted) if mean.dim() == 1 else '[C]'}, "
                    f"got {list(value.shape)}. mean and m2 are [C]; count and count_squares are scalars."
                )
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, num_channels: int, *, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no data, as the start of a merge."""
        zeros = torch.zeros(num_channels, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64, device=device), zeros, zeros)

    @classmethod
    def of(cls, x: Data, mask: Data | None = None, weights: Data | None = None, *, axis: int = 1) -> Moments:
        """Return the moments of each channel of x.

        Args:
            x: Tensor or NumPy array `[N, C, *S]` of any real dtype, integers such as images in uint8 included.
            mask: Booleans of shape `[N, *S]` or broadcastable to it; False positions do not count and may be NaN.
            weights: The weight of each value: numbers >= 0 of shape `[N, *S]` or broadcastable to it. A mask applies
                in addition.
            axis: The channel axis of x; -1 for channels last.

        Raises:
            TypeError: x is not a tensor or array of real numbers, or the mask is not boolean.
            ValueError: x has no channel axis, mask or weights do not fit x, or a weight is negative or not finite.

        Numerics: deviations from the mean are computed in float64, in two passes over each part of x. If the mean is
            1e8 standard deviations, the relative error of the standard deviation is 1e-8, which is no more than the
            effect of rounding the data to float64.

        Examples:
            >>> Moments.of(np.array([[1.0, 2.0, 9.0]]), mask=np.array([True]), axis=1).mean
            tensor([1., 2., 9.], dtype=torch.float64)
        """
        _check_data(x, axis)
        x = x.movedim(axis, 1) if isinstance(x, Tensor) else np.moveaxis(x, axis, 1)
        shape = (x.shape[0], *x.shape[2:])
        mask, weights = _check_mask(mask, shape), _check_weights(weights, shape)
        device = _float64(x[:0]).device
        parts = [_moments_of_part(x[part], mask, weights, part, shape) for part in _parts(x)]
        return cls.empty(x.shape[1], device=device).merge(*parts)

    def update(self, x: Data, mask: Data | None = None, weights: Data | None = None, *, axis: int = 1) -> Moments:
        """Return the moments of the data so far and x together; the arguments are those of `of`."""
        return self.merge(Moments.of(x, mask, weights, axis=axis))

    def merge(self, *others: Moments) -> Moments:
        """Return the moments of all the data together, on this object's device, in any order and grouping.

            n = Σ nₖ    μ = Σ nₖ·μₖ / n    M2 = Σ M2ₖ + Σ nₖ·(μₖ - μ)²

        Empty parts are skipped, whatever their mean.

        Raises:
            ValueError: the parts have different numbers of channels.
        """
        device = self.mean.device
        for other in others:
            if other.mean.shape != self.mean.shape:
                raise ValueError(
                    f"Moments.merge expects parts with {len(self.mean)} channels, got one with {len(other.mean)}. "
                    "Merge moments of the same layer or data only."
                )
        # Empty parts are skipped, because 0·NaN would be NaN.
        parts = [part for part in (self, *others) if part.count > 0]
        if not parts:
            return self
        count = torch.stack([part.count.to(device) for part in parts])
        mean = torch.stack([part.mean.to(device) for part in parts])
        m2 = torch.stack([part.m2.to(device) for part in parts])
        squares = None
        if any(part.count_squares is not None for part in parts):
            counts = [part.count if part.count_squares is None else part.count_squares for part in parts]
            squares = torch.stack([v.to(device) for v in counts]).sum()
        n = count[:, None]
        pivot = mean[count.argmax()]  # differences keep the precision of means far from zero
        merged = pivot + (n * (mean - pivot)).sum(0) / count.sum()
        return Moments(count.sum(), merged, m2.sum(0) + (n * (mean - merged) ** 2).sum(0), squares)

    @property
    def var(self) -> Tensor:
        """Biased variance `[C]`, M2/Σw, used to normalize; NaN if nothing was counted."""
        return self.m2 / self.count

    @property
    def var_unbiased(self) -> Tensor:
        """Unbiased variance `[C]`, as in running_var: M2/(m - 1), or with weights M2·V₁/(V₁² - V₂).

        Raises:
            ValueError: fewer than two values were counted.
        """
        squares = self.count if self.count_squares is None else self.count_squares
        freedom = self.count**2 - squares
        if not freedom > 1e-12 * self.count**2:
            raise ValueError(
                f"Moments.var_unbiased expects more than one value per channel, got a count of {self.count.item():g}. "
                "One value has no variance: count more data, or use var."
            )
        return self.m2 * (self.count / freedom)

    @property
    def std(self) -> Tensor:
        """Standard deviation `[C]`, the root of `var`."""
        return self.var.sqrt()


def _float64(part: Data) -> Tensor:
    if isinstance(part, Tensor):
        device = "cpu" if part.device.type == "mps" else part.device  # mps has no float64
        return part.detach().to(device=device, dtype=torch.float64)
    return torch.from_numpy(np.array(part, dtype=np.float64))


def _parts(x: Data) -> Iterator[slice]:
    per_sample = max(1, int(np.prod(x.shape[1:])))
    step = max(1, _PART // per_sample)
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def _moments_of_part(x: Data, mask: Data | None, weights: Data | None, part: slice, shape: tuple[int, ...]) -> Moments:
    values = _float64(x)
    dims = [0, *range(2, values.dim())]
    w = None
    for given in (mask, weights):
        if given is not None:
            here = _float64(_broadcast(given, shape)[part]).to(values.device)[:, None]
            w = here if w is None else w * here
    if w is None:
        count = torch.tensor(values.numel() / max(1, values.shape[1]), dtype=torch.float64, device=values.device)
        if count == 0:
            return Moments.empty(values.shape[1], device=values.device)
        weighted = values
    else:
        values = torch.where(w > 0, values, 0.0)
        count = w.sum()
        if count == 0:
            return Moments.empty(values.shape[1], device=values.device)
        weighted = w * values

    def spread(v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (values.dim() - 2))

    mean = weighted.sum(dims) / count
    centered = values - spread(mean)
    # A second sum removes the rounding error of the first, so that a constant channel deviates by exactly 0.
    correction = (centered if w is None else w * centered).sum(dims) / count
    centered = values - spread(mean + correction)
    m2 = (centered.square() if w is None else w * centered.square()).sum(dims)
    squares = None if weights is None or w is None else (w * w).sum()
    return Moments(count, mean + correction, m2, squares)


def _broadcast(given: Data, shape: tuple[int, ...]) -> Data:
    return given.expand(shape) if isinstance(given, Tensor) else np.broadcast_to(given, shape)


def _check_data(x: Data, axis: int) -> None:
    if not isinstance(x, (Tensor, np.ndarray)):
        raise TypeError(
            f"Moments.of expects x to be a torch.Tensor or a numpy.ndarray, got {type(x).__name__}. Convert it first."
        )
    real = not x.is_complex() if isinstance(x, Tensor) else x.dtype.kind in "buif"
    if not real:
        raise TypeError(f"Moments.of expects x to hold real numbers, got {x.dtype}. Convert it first.")
    if x.ndim < 2:
        raise ValueError(
            f"Moments.of expects x of shape [N, C, *S], got {list(x.shape)} ({x.ndim} dims). Add the missing "
            "dimension, for example x[:, None] for a single channel."
        )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"Moments.of expects axis in [{-x.ndim}, {x.ndim}) for x of shape {list(x.shape)}, got {axis}. "
            "Pass the axis of x's channels."
        )


def _check_fits(name: str, given: Data, shape: tuple[int, ...]) -> None:
    try:
        fits = np.broadcast_shapes(tuple(given.shape), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"Moments.of expects {name} of shape [N, *S] = {list(shape)} or broadcastable to it, got "
            f"{list(given.shape)}. It has no channel axis: it applies to all channels of a position."
        )


def _check_mask(mask: Data | None, shape: tuple[int, ...]) -> Data | None:
    if mask is None:
        return None
    mask = mask if isinstance(mask, Tensor) else np.asarray(mask)
    if mask.dtype not in (torch.bool, np.dtype(bool)):
        raise TypeError(f"Moments.of expects a mask of booleans, got {mask.dtype}. Pass numbers as weights.")
    _check_fits("mask", mask, shape)
    return mask


def _check_weights(weights: Data | None, shape: tuple[int, ...]) -> Data | None:
    if weights is None:
        return None
    weights = weights if isinstance(weights, Tensor) else np.asarray(weights)
    _check_fits("weights", weights, shape)
    if not bool(((weights >= 0) & (weights < float("inf"))).all()):
        raise ValueError(
            "Moments.of expects weights that are finite and >= 0, got some that are not. Use weight 0 for values that "
            "do not count."
        )
    return weights
