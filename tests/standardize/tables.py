"""Data, and comparisons of fitted Standardizers."""

from __future__ import annotations

from typing import Any

import numpy as np

from batchnorm.standardize import Standardizer


def table(rows: int = 60, columns: int = 4, offset: float = 3.0, seed: int = 0) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    return offset + generator.normal(size=(rows, columns)) * np.arange(1, columns + 1)


def fitted(standardizer: Standardizer) -> tuple[Any, ...]:
    return standardizer.mean_, standardizer.var_, standardizer.scale_, np.asarray(standardizer.n_samples_seen_)


def assert_same(first: Standardizer, second: Standardizer, rtol: float = 1e-12) -> None:
    for ours, theirs in zip(fitted(first), fitted(second), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-14)
