"""The state of Flax layers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from batchnorm import state
from tests.state.cases.porting import assert_close, assert_same, batch, expected, trained_layer


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_of_torch_moves_to_nnx_and_back(affine):
    source = trained_layer(affine)
    y, mean, var = expected(source)
    layer = nnx.BatchNorm(3, use_bias=affine, use_scale=affine, rngs=nnx.Rngs(0))
    state.to_nnx_(layer, state.from_torch(source))
    assert_close(layer(batch(), use_running_average=True), y)

    back = torch.nn.BatchNorm1d(3, affine=affine)
    state.to_torch_(back, dataclasses.replace(state.from_nnx(layer), batches=4))
    assert_same(back, source)

    layer(batch(), use_running_average=False)
    assert_close(layer.mean[...], mean)
    assert_close(layer.var[...], var)


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_of_torch_moves_to_linen_and_back(affine):
    source = trained_layer(affine)
    y, mean, var = expected(source)
    given = linen.BatchNorm(use_bias=affine, use_scale=affine)
    layer, variables = state.to_linen(given, state.from_torch(source))
    of_given = given.init(jax.random.key(0), jnp.zeros((2, 3)), use_running_average=True)
    assert jax.tree.structure(of_given) == jax.tree.structure(
        {name: values for name, values in variables.items() if values}
    )
    assert_close(layer.apply(variables, batch(), use_running_average=True), y)

    back = torch.nn.BatchNorm1d(3, affine=affine)
    state.to_torch_(back, dataclasses.replace(state.from_linen(layer, variables), batches=4))
    assert_same(back, source)

    _, updates = layer.apply(variables, batch(), use_running_average=False, mutable=["batch_stats"])
    assert_close(updates["batch_stats"]["mean"], mean)
    assert_close(updates["batch_stats"]["var"], var)


def test_the_dtype_of_a_layer_is_kept():
    layer = nnx.BatchNorm(3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    state.to_nnx_(layer, state.from_torch(trained_layer()))
    assert layer.scale[...].dtype == jnp.bfloat16
    _, variables = state.to_linen(linen.BatchNorm(param_dtype=jnp.bfloat16), state.from_nnx(layer))
    assert variables["params"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(variables["params"]["scale"], layer.scale[...])


def test_what_flax_does_not_have_is_an_error():
    cumulative = dataclasses.replace(state.from_torch(trained_layer()), momentum=None)
    with pytest.raises(ValueError, match="got None, the cumulative average"):
        state.to_nnx_(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), cumulative)
    with pytest.raises(ValueError, match="got None, the cumulative average"):
        state.to_linen(linen.BatchNorm(), cumulative)
    with pytest.raises(TypeError, match="without mean"):
        state.from_linen(linen.BatchNorm(), {"params": {}})
    with pytest.raises(TypeError, match="For linen, use from_linen"):
        state.from_nnx(linen.BatchNorm())
