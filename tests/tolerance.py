"""The one tolerance: the dtype's unit roundoff × Σ|terms| of the quantity compared.

A sum of rounded terms errs by a small multiple of the unit × the sum of the terms' sizes, however they cancel. The
multiple is fixed here; nothing relaxes it for a case, an operator or a machine.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from batchnorm import reference

Array = NDArray[np.float64]

# Roundings in a row on the longest path from x to dx; each adds at most one unit of its terms.
ROUNDINGS = 8

_UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
# Half of the smallest subnormal: what rounding loses near zero.
_TINY = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`."""
    return _UNIT[dtype]


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which data of `dtype` is computed with."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(terms: Array, dtype: torch.dtype, result: Array | None = None) -> Array:
    """Allowed error of a quantity with these terms' sizes; `result`, if it is rounded to `dtype` at the end."""
    allowed = ROUNDINGS * unit(arithmetic(dtype)) * terms
    if result is not None:
        allowed = allowed + unit(dtype) * np.abs(result) + _TINY[dtype]
    return allowed


def assert_within(actual: torch.Tensor, expected: Array, allowed: Array, what: str) -> None:
    """`|actual - expected| ≤ allowed` everywhere; NaN and infinity where expected, and nowhere else."""
    got = actual.detach().double().numpy()
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    finite = np.isfinite(expected)
    assert (np.isfinite(got) == finite).all(), f"{what}: not finite at {np.argwhere(np.isfinite(got) != finite)[:3]}"
    excess = np.where(finite, np.abs(got - expected) - allowed, 0.0)
    if excess.size and excess.max() > 0:
        at = np.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{what}{[int(i) for i in at]}: {got[at]} instead of {expected[at]}, "
            f"off by {abs(got[at] - expected[at]):.3g}, allowed {np.broadcast_to(allowed, excess.shape)[at]:.3g}"
        )


class Terms:
    """The sizes of the terms of each quantity of a pass, from the float64 reference."""

    def __init__(self, forward: reference.Forward, residual: Array | None, bias: Array | None) -> None:
        self.forward = forward
        spread = forward.layout.spread
        # x̂ = ((x - mean) - mean_low)·invstd: its error is that of x̂ and of the mean, both in deviations.
        self.x_hat = np.abs(forward.x_hat) + 1.0
        self.z = np.abs(spread(forward.weight)) * self.x_hat
        if bias is not None:
            self.z = self.z + np.abs(spread(bias))
        if residual is not None:
            self.z = self.z + np.abs(residual)

    def deviation(self) -> Array:
        """Mean absolute deviation: the terms of the mean."""
        return self.forward.layout.total(self.forward.share * np.abs(self.forward.x_centered), like=self.forward.mean)

    def dz(self, dy: Array, *, smooth: bool) -> Array:
        """dz, and what z's error does to it through f″ (at most 1.2 for every activation here)."""
        size = np.abs(dy * self.forward.slope)
        return size + np.abs(dy) * 1.2 * self.z if smooth else size

    def sums(self, dz: Array, like: Array) -> tuple[Array, Array]:
        """Σ dz and Σ dz·x̂."""
        total = self.forward.layout.total
        return total(dz, like=like), total(dz * self.x_hat, like=like)

    def dx(self, dz: Array) -> Array:
        """invstd·(γ·dz - (Σγ·dz + x̂·Σγ·dz·x̂)/m)."""
        forward, spread, total = self.forward, self.forward.layout.spread, self.forward.layout.total
        dx_hat = np.abs(spread(forward.weight)) * dz
        first, second = total(dx_hat, like=forward.mean), total(dx_hat * self.x_hat, like=forward.mean)
        through = forward.share * (spread(first) + self.x_hat * spread(second))
        return np.asarray(spread(forward.invstd) * (dx_hat + through))
