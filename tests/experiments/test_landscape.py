"""Values measured along the gradient, compared with second derivatives and with single measurements."""

import copy

import landscape
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.nn import BatchNorm1d


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)).double().train()


X, Y = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4


def flat(vectors):
    return torch.cat([vector.flatten() for vector in vectors])


def loss_and_gradient(model, step=0.0, direction=None):
    model = copy.deepcopy(model)
    parameters = list(model.parameters())
    if direction is not None:
        with torch.no_grad():
            for parameter, part in zip(parameters, direction, strict=True):
                parameter -= step * part
    loss = F.cross_entropy(model(X), Y)
    return loss.item(), torch.autograd.grad(loss, parameters)


def test_near_by_the_smoothness_is_the_curvature_along_the_gradient_and_the_loss_falls_by_its_square():
    model = network()
    parameters = list(model.parameters())
    first = torch.autograd.grad(F.cross_entropy(model(X), Y), parameters, create_graph=True)
    g = flat(first)
    hg = flat(torch.autograd.grad(g.dot(g.detach()), parameters))
    found = landscape.variation_along_gradient(model, X, Y, (1e-5, 3e-5))
    assert found.smoothness == pytest.approx((hg.norm() / g.norm()).item(), rel=1e-3)
    assert found.gradient == pytest.approx((3e-5 * hg.norm()).item(), rel=1e-3)
    assert found.loss == pytest.approx((2e-5 * g.square().sum()).item(), rel=1e-3)


def test_far_away_it_is_what_one_finds_there():
    model = network()
    state = copy.deepcopy(model.state_dict())
    _, start = loss_and_gradient(model)
    distances = (0.5, 1.0, 4.0)
    losses, changes = [], []
    for distance in distances:
        loss, there = loss_and_gradient(model, distance, start)
        losses.append(loss)
        changes.append((flat(there) - flat(start)).norm().item())
    moved = [distance * flat(start).norm().item() for distance in distances]
    found = landscape.variation_along_gradient(model, X, Y, distances)
    assert found.loss == pytest.approx(max(losses) - min(losses))
    assert found.gradient == pytest.approx(max(changes))
    assert found.smoothness == pytest.approx(max(c / m for c, m in zip(changes, moved, strict=True)))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
