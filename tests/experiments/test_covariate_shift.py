"""The change of each layer's gradient, against copies of the network that are changed by hand."""

import copy

import covariate_shift
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.nn import BatchNorm2d

RATE = 0.3


def network(norm):
    torch.manual_seed(0)
    norms = [BatchNorm2d(3), BatchNorm2d(4)] if norm else [nn.Identity(), nn.Identity()]
    layers = [nn.Conv2d(1, 3, 3), norms[0], nn.Tanh(), nn.Conv2d(3, 4, 3, bias=not norm), norms[1], nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).double().train()


def gradients(model, x, y):
    model = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("norm", [False, True])
def test_shift_is_the_change_of_a_layers_gradient_when_all_below_has_stepped_and_it_has_not(norm):
    model = network(norm)
    state = copy.deepcopy(model.state_dict())
    x, y = torch.randn(8, 1, 6, 6, dtype=torch.float64), torch.arange(8) % 5
    before = gradients(model, x, y)
    found = covariate_shift.shifts(model, x, y, RATE)
    assert len(found) == 2  # the first layer has none below
    for (shift, length, cosine), layer in zip(found, ("3", "7"), strict=True):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if int(name.split(".")[0]) < int(layer):
                    parameter -= RATE * before[name]
        first, second = before[f"{layer}.weight"], gradients(moved, x, y)[f"{layer}.weight"]
        assert shift == pytest.approx((first - second).norm().item())
        assert length == pytest.approx(first.norm().item())
        assert cosine == pytest.approx(F.cosine_similarity(first.flatten(), second.flatten(), dim=0).item())
        assert shift > 1e-4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_noise_moves_and_stretches_each_channel_within_its_bounds_and_anew():
    noise = covariate_shift.Noise()
    zeros, ones = torch.zeros(400, 50, 2, 2), torch.ones(400, 50, 2, 2)
    shift = noise(zeros)
    assert torch.equal(shift, shift[..., :1, :1].expand_as(shift))  # the same at all positions
    assert shift.abs().max() <= 0.6 and shift.mean((0, 2, 3)).abs().max() <= 0.52
    assert shift.mean((0, 2, 3)).std() == pytest.approx(1 / 12**0.5, rel=0.35)
    assert not torch.equal(noise(zeros), noise(zeros))
    torch.manual_seed(1)
    moved = noise(zeros)
    torch.manual_seed(1)
    scale = noise(ones) - moved
    assert scale.mean((0, 2, 3)).min() > 0.97 and scale.mean((0, 2, 3)).max() < 1.28
    assert (scale - scale.mean(0)).std() == pytest.approx(0.1, rel=0.1)
    assert noise(torch.zeros(6, 3)).shape == (6, 3)
    x = torch.randn(3, 2)
    assert torch.equal(noise.eval()(x), x)
