"""The state of a layer, read from and written into layers of torch; the cases of other frameworks."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm
from batchnorm import reference, state
from tests.keras.backends import run_cases


def test_keras_and_flax():
    if find_spec("flax") is None:
        pytest.skip("Flax is not installed")
    run_cases("jax", "tests/state/cases/test_keras.py", "tests/state/cases/test_flax.py")


def trained(layer: nn.Module, *shape: int, steps: int = 5) -> nn.Module:
    """The layer with statistics of several batches, and random γ and β."""
    for t in layer.parameters():
        nn.init.normal_(t)
    for _ in range(steps):
        layer(3 * torch.randn(shape, dtype=torch.float64).to(layer.running_mean.dtype) + 1)
    return layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.03, None])
def test_a_copy_has_the_same_bits(dtype, affine, momentum):
    layer = trained(nn.BatchNorm1d(4, 1e-3, momentum, affine=affine, dtype=dtype), 8, 4)
    copy = batchnorm.BatchNorm2d(4, affine=affine, dtype=dtype)
    state.to_torch_(copy, state.from_torch(layer))
    assert (copy.momentum, copy.eps) == (momentum, 1e-3)
    torch.testing.assert_close(dict(copy.state_dict()), dict(layer.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        batchnorm.BatchNormAct2d(4),
        batchnorm.BatchRenorm2d(4),
        batchnorm.GhostBatchNorm2d(4, ghost_size=4),
        batchnorm.FrozenBatchNorm2d(4),
        nn.SyncBatchNorm(4),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_the_family_have_a_state(layer):
    source = trained(nn.BatchNorm1d(4), 8, 4)
    state.to_torch_(layer, state.from_torch(source))
    written = state.from_torch(layer)
    np.testing.assert_array_equal(written.var, source.running_var.double().numpy())
    np.testing.assert_array_equal(written.weight, source.weight.detach().double().numpy())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_biased_is_what_biased_batches_would_have_left(momentum, steps):
    n, layer = 6, nn.BatchNorm1d(3, momentum=momentum, dtype=torch.float64)
    var, batches = np.ones(3), [torch.randn(n, 3, dtype=torch.float64) for _ in range(steps)]
    for step, x in enumerate(batches, 1):
        layer(x)
        rate = 1 / step if momentum is None else momentum
        var = (1 - rate) * var + rate * reference.moments(x.numpy()).var
    unbiased = state.from_torch(layer)
    biased = unbiased.to_biased(n)
    assert (unbiased.unbiased, biased.unbiased) == (True, False)
    np.testing.assert_allclose(biased.var, var, rtol=1e-14)
    np.testing.assert_allclose(biased.to_unbiased(n).var, unbiased.var, rtol=1e-14)
    assert biased.to_biased(n) is biased


def test_a_state_is_a_copy():
    layer = trained(nn.BatchNorm1d(3), 4, 3)
    before = state.from_torch(layer)
    var = before.var.copy()
    trained(layer, 4, 3)
    np.testing.assert_array_equal(before.var, var)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (nn.Linear(3, 3), TypeError, "got Linear without running_mean"),
        (nn.BatchNorm1d(3, track_running_stats=False), TypeError, "got BatchNorm1d without them"),
        (nn.InstanceNorm1d(3, track_running_stats=True), TypeError, "got InstanceNorm1d"),
        (nn.LazyBatchNorm1d(), TypeError, "Call a lazy layer once"),
        (batchnorm.DomainBatchNorm1d(3, num_domains=2), TypeError, r"got \[2, 3\]"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_without_such_a_state_is_an_error(layer, error, message):
    with pytest.raises(error, match=message):
        state.from_torch(layer)


@pytest.mark.parametrize("other", [nn.BatchNorm1d(4), nn.BatchNorm1d(3, affine=False)], ids=["channels", "affine"])
def test_a_layer_with_other_vectors_is_left(other):
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match="expects a state with"):
        state.to_torch_(other, state.from_torch(trained(nn.BatchNorm1d(3), 4, 3)))
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)


def test_values_out_of_range_are_errors():
    fresh = state.from_torch(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="momentum in"):
        dataclasses.replace(fresh, momentum=1.5)
    with pytest.raises(ValueError, match="eps"):
        dataclasses.replace(fresh, eps=-1.0)
    with pytest.raises(ValueError, match="values >= 2, got 1"):
        fresh.to_biased(1)
