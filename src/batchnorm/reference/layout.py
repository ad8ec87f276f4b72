"""The channels and samples of x, and checks of arguments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def float64(a: ArrayLike) -> Array:
    """Return `a` in float64; long double stays long double."""
    values: Array = np.asarray(a)
    return values.astype(np.result_type(values, np.float64), copy=False)


def require(holds: bool | np.bool_, must: str, came: object, do: str) -> None:
    """Raise a ValueError with the requirement, the value received and the fix, unless the requirement `holds`."""
    if not holds:
        raise ValueError(f"{must}, got {came}. {do}")


def shaped(name: str, a: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return `a` in float64 after checking its shape."""
    a = float64(a)
    require(a.shape == shape, f"{name} must have shape {list(shape)}", list(a.shape), "Reshape or expand it.")
    return a


@dataclass(frozen=True)
class Layout:
    """The mapping between values per channel and values of x.

    Attributes:
        shape: Shape of x.
        axis: The channel axis, not negative. Samples are on the first of the other axes.
        index: `[N]`, the row of `[K, C]` values for each sample; None if all values are `[C]`.
    """

    shape: tuple[int, ...]
    axis: int
    index: NDArray[np.intp] | None

    def spread(self, v: Array) -> Array:
        """Reshape `[C]` or `[K, C]` values so that they broadcast against x."""
        rows = v[None] if v.ndim == 1 else v[self.index]  # [1, C] or [N, C]
        return np.moveaxis(rows.reshape(*rows.shape, *[1] * (len(self.shape) - 2)), 1, self.axis)

    def total(self, t: Array, like: Array) -> Array:
        """Sum t over the values of x that use the same entry of `like`; this is the transpose of `spread`."""
        per_sample = np.moveaxis(t, self.axis, 1).sum(axis=tuple(range(2, t.ndim)))  # [N, C]
        if like.ndim == 1:
            return np.asarray(per_sample.sum(axis=0))
        total = np.zeros(like.shape, t.dtype)
        for row, t_n in zip(np.asarray(self.index), per_sample, strict=True):
            total[row] += t_n
        return total

    def per_channel(self, name: str, v: ArrayLike) -> Array:
        """Return an argument after checking that it is `[C]`, or `[K, C]` with a row for every index."""
        v, channels = float64(v), self.shape[self.axis]
        rows = 0 if self.index is None else self.index.max(initial=-1) + 1
        require(
            v.shape == (channels,) or (self.index is not None and v.shape == (max(len(v), rows), channels)),
            f"{name} must have shape [{channels}], or with index [K >= {rows}, {channels}]",
            list(v.shape),
            "Pass one value per channel; if the channels of x are not on axis 1, pass axis.",
        )
        return v


def layout_of(x: Array, axis: int, index: ArrayLike | None) -> Layout:
    """Return the layout of x: its channels and samples."""
    require(x.ndim >= 2, "x must have a sample and a channel axis", list(x.shape), "Reshape it to [N, C].")
    require(-x.ndim <= axis < x.ndim, f"axis must be in [{-x.ndim}, {x.ndim})", axis, "The default is 1.")
    axis %= x.ndim
    if index is None:
        return Layout(x.shape, axis, None)
    rows, samples = np.asarray(index), x.shape[1 if axis == 0 else 0]
    fits = rows.shape == (samples,) and np.issubdtype(rows.dtype, np.integer) and (rows >= 0).all()
    require(fits, f"index must hold {samples} integers >= 0, one per sample", rows, "Number groups from 0.")
    return Layout(x.shape, axis, rows.astype(np.intp))


def weights_of(weights: ArrayLike | None, layout: Layout) -> Array:
    """Return `weights [N, *S]`, or ones, with a channel axis of size 1."""
    shape = layout.shape[: layout.axis] + layout.shape[layout.axis + 1 :]
    w = np.ones(shape) if weights is None else shaped("weights", weights, shape)
    bad = w[~((w >= 0) & (w < np.inf))]
    require(bad.size == 0, "weights must be finite and >= 0", bad[:1], "Masked values have weight 0.")
    return np.expand_dims(w, layout.axis)


def divisor(n: Array) -> Array:
    """Return n, with 1 instead of 0; there, the dividend is 0 as well."""
    return np.where(n > 0, n, 1.0)
