"""Masks of decorrelated batch normalization."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from batchnorm.nn.decorrelated import DecorrelatedBatchNorm1d, decorrelated_batch_norm
from tests.nn.correlated import correlated


def packed_and_padded(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return values `[m, C]`, the same spread over `[N, C, L]` with NaN elsewhere, and the mask `[N, L]`."""
    mask = torch.rand(4, 9) < 0.6
    values = correlated(int(mask.sum()), 5, dtype=dtype)
    padded = torch.full((4, 9, 5), torch.nan, dtype=dtype)
    padded[mask] = values
    return values, padded.movedim(-1, 1), mask


def test_a_mask_gives_the_same_as_the_values_without_padding() -> None:
    values, padded, mask = packed_and_padded()
    layers = [DecorrelatedBatchNorm1d(5, group_size=3, momentum=0.3, dtype=torch.float64) for _ in range(2)]
    found = []
    for layer, x in zip(layers, (values, padded), strict=True):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, mask=mask) if x is padded else layer(leaf)
        assert y.isfinite().all()
        y = y.movedim(1, -1)[mask] if x is padded else y
        y.pow(3).sum().backward()
        dx = leaf.grad.movedim(1, -1)[mask] if x is padded else leaf.grad
        found.append([y, dx, layer.weight.grad])
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected)
    assert_close(layers[0].state_dict(), layers[1].state_dict())
    assert_close(layers[0].eval()(padded, mask), layers[0](padded), equal_nan=True)


def test_integer_weights_are_repetitions() -> None:
    x, weights = correlated(6, 5), torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 4.0])
    layers = [DecorrelatedBatchNorm1d(5, dtype=torch.float64) for _ in range(2)]
    y = layers[0](x, mask=weights)
    repeated = layers[1](x.repeat_interleave(weights.long(), 0))
    assert_close(y.repeat_interleave(weights.long(), 0), repeated)
    assert_close(layers[0].state_dict(), layers[1].state_dict())


@pytest.mark.parametrize("create_graph", [False, True])
def test_no_counted_value_gives_finite_gradients(create_graph: bool) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = decorrelated_batch_norm(x, None, None, training=True, mask=torch.zeros(4))
    (dx,) = torch.autograd.grad(y, x, torch.randn(4, 3, dtype=torch.float64), create_graph=create_graph)
    assert dx.isfinite().all()


def test_no_counted_value_updates_nothing_and_one_updates_only_the_mean() -> None:
    layer = DecorrelatedBatchNorm1d(5)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 5, 9)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    assert layer(x, mask).isfinite().all()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    mask[2, 3] = True
    y = layer(x, mask)
    assert_close(y[2, :, 3], torch.zeros(5))
    assert_close(layer.running_mean, 0.1 * x[2, :, 3])
    assert torch.equal(layer.running_whitening, torch.eye(5))
    assert layer.num_batches_tracked == 1
    with pytest.raises(ValueError, match=r"DecorrelatedBatchNorm1d expects a mask of shape \[N, \*S\] = \[4, 9\]"):
        layer(x, mask[:, :3])
