"""Standardization of sparse matrices of SciPy, which keeps their zeros."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.standardize.features import Features

if TYPE_CHECKING:
    from numpy.typing import NDArray


def is_sparse(x: object) -> bool:
    """Return whether x is a sparse matrix or array of SciPy."""
    sparse = sys.modules.get("scipy.sparse")  # one exists only if it was imported
    return sparse is not None and bool(sparse.issparse(x))


def canonical(x: Any) -> Any:
    """Return x as CSR or CSC, with real numbers, in which each entry occurs once."""
    x = x if x.format in ("csr", "csc") else x.tocsr()
    if x.dtype.kind == "c":
        raise ValueError(
            f"Standardizer expects real numbers, got {x.dtype}. Pass the real and the imaginary part as separate "
            "features: Complex data not supported."
        )
    if not x.has_canonical_format:
        x = x.copy()
        x.sum_duplicates()
    return x


def values(x: Any) -> Tensor:
    """Return the entries, float64 `[E]`."""
    return torch.from_numpy(x.data.astype(np.float64))


def moments(x: Any, weights: Tensor | None, *, omit_nan: bool) -> Features:
    """Compute the moments of a canonical matrix `[N, C]`: those of its entries, merged with those of its zeros."""
    samples, features = x.shape
    rows, columns = _places(x)
    entries = values(x)
    of_rows = torch.ones(samples, dtype=torch.float64, device="cpu") if weights is None else weights
    w = of_rows[rows]
    stored = torch.bincount(columns, w, features)
    kept = w != 0
    if omit_nan:
        kept &= ~entries.isnan()
    if not kept.all():
        entries, columns, w = entries[kept], columns[kept], w[kept]
    found = Features.of_entries(entries, columns, w, features)
    zeros = (of_rows.sum() - stored).clamp_min(0.0)
    nothing = torch.zeros(features, dtype=torch.float64, device="cpu")
    return found.merge(Features(zeros, nothing, nothing, nothing))


def scaled(x: Any, factor: NDArray[np.float64], *, divide: bool) -> Any:
    """Return a canonical matrix whose columns are divided or multiplied by factors, in its format and dtype."""
    dtype = x.dtype if x.dtype.kind == "f" else np.dtype(np.float64)
    result = x.astype(dtype, copy=True)
    factors = factor[_places(x)[1].numpy()]
    entries = x.data.astype(np.float64)
    result.data[:] = entries / factors if divide else entries * factors
    return result


def _places(x: Any) -> tuple[Tensor, Tensor]:
    """Return the row and the column of each entry."""
    major = np.repeat(np.arange(len(x.indptr) - 1), np.diff(x.indptr))
    rows, columns = (major, x.indices) if x.format == "csr" else (x.indices, major)
    return torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(columns.astype(np.int64))
