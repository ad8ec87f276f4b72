"""The pivot, from which the compiled kernels take deviations: it is computed from a few values."""

from __future__ import annotations

import pytest
import torch

import batchnorm.ops  # noqa: F401  (defines the operators)
from tests.ops import implementations
from tests.tolerance import assert_within, bound

NAME = pytest.mark.parametrize("name", implementations.names())


@NAME
@pytest.mark.parametrize(
    ("shape", "period", "far"),
    [((1024, 3, 64), 256, 1), ((2**18, 3), 2**14, 64)],  # the pivot is computed from 4 samples, and from 16 rows
    ids=["planes", "rows"],
)
def test_values_far_from_the_pivot_cost_the_variance_no_precision(
    name: str, shape: tuple[int, ...], period: int, far: int
) -> None:
    x = torch.randn(shape)
    x[torch.arange(shape[0]) % period < far] += 1e4
    with implementations.chosen(name) as op:
        var = op("train_forward")(x, None, None, None, 1e-5, "none", 0.0)[3]
    expected = x.transpose(0, 1).flatten(1).double().var(1, correction=0).numpy()
    assert_within(var, expected, bound(expected, x.dtype), "var")


@NAME
@pytest.mark.parametrize(("shape", "far"), [((2**13, 3, 64), 8), ((2**19, 3), 512)], ids=["planes", "rows"])
def test_values_far_from_the_pivot_of_their_group_cost_the_variance_no_precision(
    name: str, shape: tuple[int, ...], far: int
) -> None:
    x, index = torch.randn(shape), torch.arange(shape[0]) % 2
    x[:far] += 1e4  # the first samples of each group, from which its pivot is computed
    with implementations.chosen(name) as op:
        count, _, _, m2 = op("moments")(x, index, None, 2)
    for group in range(2):
        expected = x[index == group].transpose(0, 1).flatten(1).double().var(1, correction=0).numpy()
        assert_within(m2[group].double() / count[group], expected, bound(expected, x.dtype), "var")
