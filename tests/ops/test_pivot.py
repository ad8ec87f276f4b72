"""The pivot, from which the compiled kernels take deviations: it is computed from a few values."""

from __future__ import annotations

import pytest
import torch

import batchnorm.ops  # noqa: F401  (defines the operators)
from tests.ops import implementations
from tests.tolerance import assert_within, bound


@pytest.mark.parametrize("name", implementations.names())
def test_values_far_from_the_pivot_cost_the_variance_no_precision(name: str) -> None:
    x = torch.randn(1024, 3, 64)
    x[::256] += 1e4  # 4 samples, from which the pivot is computed
    with implementations.chosen(name) as op:
        var = op("train_forward")(x, None, None, None, 1e-5, "none", 0.0)[3]
    expected = x.double().var((0, 2), correction=0).numpy()
    assert_within(var, expected, bound(expected, x.dtype), "var")
