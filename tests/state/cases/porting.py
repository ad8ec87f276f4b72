"""A layer of torch with a state worth porting, and what another layer must compute after it got the state."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from batchnorm import reference

EPS, MOMENTUM = 1e-3, 0.05
Array = NDArray[np.float64]


def trained_layer(affine: bool = True) -> torch.nn.BatchNorm1d:
    """A layer after several batches, with random γ and β."""
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm1d(3, EPS, MOMENTUM, affine=affine)
    for t in layer.parameters():
        torch.nn.init.normal_(t)
    for _ in range(4):
        layer(3 * torch.randn(8, 3) + 1)
    return layer.eval()


def batch() -> NDArray[np.float32]:
    """A batch with channels last, `[N, C]`."""
    return np.random.default_rng(1).normal(2.0, 3.0, (16, 3)).astype(np.float32)


def expected(layer: torch.nn.BatchNorm1d) -> tuple[Array, Array, Array]:
    """The result in evaluation, and the running mean and variance after one more batch in Keras and Flax."""
    mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    weight, bias = (None if t is None else t.detach().double().numpy() for t in (layer.weight, layer.bias))
    y = reference.forward_inference(batch(), mean, var, weight, bias, eps=EPS).y
    after = reference.update_running(mean, var, reference.moments(batch()), momentum=1 - MOMENTUM, convention="keras")
    return y, after.mean, after.var


def assert_close(got: object, wanted: Array) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2e-6, atol=2e-6)


def assert_same(layer: torch.nn.Module, other: torch.nn.Module) -> None:
    """Both layers have the same bits, momentum and ε."""
    torch.testing.assert_close(dict(layer.state_dict()), dict(other.state_dict()), rtol=0, atol=0)
    assert (layer.momentum, layer.eps) == (other.momentum, other.eps)
