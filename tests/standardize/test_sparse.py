"""Sparse matrices, which keep their zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.standardize import Standardizer

sparse = pytest.importorskip("scipy.sparse")


def matrix(seed: int = 0, rows: int = 50) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(seed)
    x = generator.normal(5, 2, (rows, 4)) * (generator.random((rows, 4)) < 0.3)
    x[:, 3] = 1 + np.arange(rows)  # without zeros
    return x


@pytest.mark.parametrize("make", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_results_are_those_of_dense_data(make: Any, dtype: type) -> None:
    dense = matrix().astype(dtype)
    x = make(dense)
    ours, expected = Standardizer(with_mean=False).fit(x), Standardizer(with_mean=False).fit(dense)
    for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(expected, name), rtol=1e-14)
    y = ours.transform(x)
    assert type(y) is type(x) and y.dtype == dtype and y.nnz == x.nnz
    np.testing.assert_allclose(y.toarray(), expected.transform(dense), rtol=1e-7 if dtype == np.float32 else 1e-15)
    np.testing.assert_allclose(ours.inverse_transform(y).toarray(), dense, rtol=1e-6 if dtype == np.float32 else 1e-15)
    np.testing.assert_array_equal(x.toarray(), dense)


def test_results_are_those_of_standard_scaler() -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    dense, w = matrix(), np.arange(50.0)
    dense[3:6, 0] = np.nan
    x = sparse.csr_array(dense)
    for weights in (None, w):
        ours = Standardizer(with_mean=False).fit(x, sample_weight=weights)
        theirs = preprocessing.StandardScaler(with_mean=False).fit(x, sample_weight=weights)
        for name in ("mean_", "var_", "scale_", "n_samples_seen_"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12)
        np.testing.assert_allclose(ours.transform(x).toarray(), theirs.transform(x).toarray(), rtol=1e-12)


def test_parts_and_other_formats_give_the_same() -> None:
    dense = matrix()
    expected = Standardizer(with_mean=False).fit(dense)
    first, second = sparse.coo_array(dense[:20]), sparse.csr_array(dense[20:])
    twice = sparse.csr_array((np.r_[second.data, second.data] / 2, (np.tile(second.tocoo().coords[0], 2),
                              np.tile(second.tocoo().coords[1], 2))), second.shape)  # fmt: skip
    parts = Standardizer(with_mean=False).partial_fit(first).partial_fit(twice)
    np.testing.assert_allclose(parts.var_, expected.var_, rtol=1e-14)
    np.testing.assert_allclose(Standardizer(with_mean=False).fit(iter([first, second])).var_, expected.var_, rtol=1e-14)
    whole = Standardizer(with_mean=False).fit(sparse.csr_array(dense.astype(int)))
    np.testing.assert_allclose(whole.transform(sparse.csr_array(dense.astype(int))).toarray().std(0), 1, rtol=1e-12)


def test_errors_of_sparse_data() -> None:
    x, s = sparse.csr_array(matrix()), Standardizer(with_mean=False)
    for use in (Standardizer().fit, Standardizer().partial_fit, Standardizer().fit(matrix()).transform):
        with pytest.raises(ValueError, match=r"Cannot center sparse matrices: pass with_mean=False"):
            use(x)
    with pytest.raises(ValueError, match="expects out with dense data only"):
        s.fit(x).transform(x, out=matrix())
    for value, policy, message in ((np.inf, "omit", "infinity"), (np.nan, "raise", "NaN")):
        wrong = sparse.csr_array(np.where(matrix() == 1, value, matrix()))
        with pytest.raises(ValueError, match=f"got {message}"):
            Standardizer(with_mean=False, nan_policy=policy).fit(wrong)
    with pytest.raises(ValueError, match="dense data for output in pandas"):
        s.set_output(transform="pandas").transform(x)
