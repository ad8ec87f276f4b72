"""The state of Keras layers."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import torch

from batchnorm import state
from tests.state.cases.porting import assert_close, assert_same, batch, expected, trained_layer


def built(**options: object) -> keras.layers.BatchNormalization:
    layer = keras.layers.BatchNormalization(**options)
    layer.build((None, 3))
    return layer


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_of_torch_moves_to_keras_and_back(affine):
    source = trained_layer(affine)
    y, mean, var = expected(source)
    layer = built(center=affine, scale=affine)
    state.to_keras_(layer, state.from_torch(source))
    assert_close(layer(batch(), training=False), y)

    back = torch.nn.BatchNorm1d(3, affine=affine)
    state.to_torch_(back, dataclasses.replace(state.from_keras(layer), batches=4))
    assert_same(back, source)

    layer(batch(), training=True)
    assert_close(keras.ops.convert_to_numpy(layer.moving_mean.value), mean)
    assert_close(keras.ops.convert_to_numpy(layer.moving_variance.value), var)


def test_the_state_of_a_fresh_layer():
    found = state.from_keras(built(momentum=0.97, scale=False))
    assert (found.momentum, found.eps, found.unbiased, found.batches) == (0.03, 1e-3, False, None)
    assert found.weight is None and found.bias is not None
    np.testing.assert_array_equal(found.var, np.ones(3))


def test_what_keras_does_not_have_is_an_error():
    source = state.from_torch(trained_layer())
    with pytest.raises(TypeError, match="got BatchNormalization without them. Build it first"):
        state.from_keras(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match="got None, the cumulative average"):
        state.to_keras_(built(), dataclasses.replace(source, momentum=None))
    with pytest.raises(ValueError, match="renorm=False"):
        state.to_keras_(built(renorm=True), source)
    with pytest.raises(ValueError, match="weight of shape none"):
        state.to_keras_(built(scale=False), source)
