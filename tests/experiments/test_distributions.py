"""How far percentiles wander, against histories whose answer is known, and that looking changes nothing."""

import distributions
import pytest
import torch
from network import initialized_alike

from batchnorm.compare.inputs.data import Data
from batchnorm.compare.inputs.networks import sigmoid_mlp


def images(count=200):
    x = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(count) % 10
    return Data("noise", x, y, x, y, 10, "")


def test_a_unit_that_moves_as_a_whole_wanders_by_as_much_and_one_that_widens_by_two_thirds_of_its_ends():
    moving = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 3.0, 4.0], [0.0, 1.0, 2.0]])
    widening = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-4.0, 0.0, 4.0]])
    steady = torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3)
    found = distributions.wandering(torch.stack([moving, widening, steady], dim=-1))
    assert found.tolist() == pytest.approx([3, 2, 0])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_percentiles_are_of_what_the_sigmoids_of_the_last_hidden_layer_get(norm):
    data = images()
    network = initialized_alike(sigmoid_mlp, norm, data, seed=0).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    low, middle, high = distributions.percentiles(network, data.x_train)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert len(network.hidden3.activation._forward_pre_hooks) == 0
    assert (low < middle).all() and (middle < high).all()
    with torch.no_grad():
        before_it = list(dict(network.named_children())).index("linear3")
        hidden = network[: before_it + 1](data.x_train)
        inputs = hidden if norm == "none" else (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + 1e-5).sqrt()
    for percentile, value in zip((0.15, 0.5, 0.85), (low, middle, high), strict=True):
        torch.testing.assert_close(value, inputs.quantile(percentile, dim=0), rtol=1e-4, atol=1e-5)


def test_images_become_black_and_white():
    found = distributions.binary(images())
    assert set(found.x_train.unique().tolist()) == {0.0, 1.0}


def test_both_networks_start_with_the_same_weights():
    plain, normalized = (initialized_alike(sigmoid_mlp, norm, images(), seed=5) for norm in ("none", "batch"))
    for name in ("linear1.weight", "linear2.weight", "linear3.weight", "linear4.weight", "linear4.bias"):
        assert torch.equal(plain.get_parameter(name), normalized.get_parameter(name))
