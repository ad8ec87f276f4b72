"""Standardize a Dask array that is too large for any worker: fit the blocks separately, merge, transform lazily.

Needs `pip install 'dask[array]'`.
"""

from __future__ import annotations

from functools import reduce

import dask
import dask.array as da

from batchnorm import Standardizer


def main() -> None:
    """Fit, transform, and show that it worked."""
    x = da.random.default_rng(0).normal(1e6, 3.0, size=(200_000, 16), chunks=(20_000, 16))
    parts = [dask.delayed(Standardizer().fit)(block) for block in x.to_delayed().ravel()]
    standardizer = reduce(Standardizer.merge, dask.compute(*parts))
    y = x.map_blocks(standardizer.transform, dtype=x.dtype)
    largest, least, most = dask.compute(abs(y.mean(0)).max(), y.std(0).min(), y.std(0).max())
    print(f"{standardizer.n_samples_seen_} rows in {len(parts)} blocks")
    print(f"largest mean {largest:.0e}, standard deviations {least:.12f} to {most:.12f}")


if __name__ == "__main__":
    main()
