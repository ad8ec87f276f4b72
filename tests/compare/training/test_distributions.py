"""Distributions at every normalization and activation after training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import nn as ours
from batchnorm.compare.inputs import models, norms
from batchnorm.compare.inputs.networks import mlp, resnet20
from batchnorm.compare.records import Distribution
from batchnorm.compare.training.distributions import distributions
from tests.foreign_layers import TimmAct

X = 2 + 3 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
STAGES = ["input", "normalized", "activated"]


def assert_of(record: Distribution, values: Tensor) -> None:
    assert sum(record.counts) == values.numel()
    assert (record.low, record.high) == pytest.approx((values.min().item(), values.max().item()), rel=1e-5)
    np.testing.assert_allclose(record.percentiles, np.percentile(values.detach(), [15, 50, 85]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["none", "batch", "layer"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_each_normalization_has_three(spec: str, placement: str) -> None:
    norm = norms.parse(spec, placement)
    network = mlp(norm, (8,), 3)
    found = distributions(network, norm, X)
    assert [(r.site, r.layer, r.stage) for r in found] == [
        (site, f"hidden{site + 1}.norm", stage) for site in (0, 1) for stage in STAGES
    ]
    assert network.training and not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    network.eval()
    x = network.linear1(X)
    if placement == "before":
        values = x, network.hidden1.norm(x), network.hidden1.norm(x).relu()
    else:
        values = x.relu(), network.hidden1.norm(x.relu()), x.relu()
    for record, expected in zip(found, values, strict=False):
        assert_of(record, expected)


class Functional(nn.Module):
    """Calls its activations as functions, with or without batch normalization."""

    def __init__(self, normalized: bool, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(8, 16), activation
        self.norm = nn.BatchNorm1d(16) if normalized else None
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.last(self.activation(x if self.norm is None else self.norm(x)))


@pytest.mark.parametrize("activation", [F.relu, torch.tanh, Tensor.sigmoid, F.gelu, torch.relu_, F.leaky_relu])
def test_activations_that_are_functions_are_found(activation: Callable[[Tensor], Tensor]) -> None:
    for normalized in (True, False):
        network, norm = Functional(normalized, activation), norms.parse("as-is")
        models.Model("f", lambda network=network: network, finished=True)(norm, X, 3)
        found = distributions(network, norm, X)
        assert [(r.site, r.stage) for r in found] == [(0, stage) for stage in STAGES]
        x = network.linear(X)
        y = network.norm.eval()(x) if normalized else x
        for record, expected in zip(found, (x, y, activation(y.clone())), strict=True):
            assert_of(record, expected)
        assert found[0].layer == ("norm" if normalized else f"{activation.__name__} 1")


def test_an_activation_behind_an_addition_belongs_to_the_last_normalization() -> None:
    norm = norms.parse("batch")
    found = distributions(resnet20(norm, (1, 8, 8), 3), norm, torch.randn(2, 1, 8, 8))
    assert [r.stage for r in found] == 19 * STAGES
    assert found[-1].layer == "block3_3.norm2"


@pytest.mark.parametrize(
    ("layer", "stages"),
    [
        (ours.BatchNormAct2d(8), ["input", "activated"]),
        (ours.BatchNormAct2d(8, activation="none"), STAGES),
        (TimmAct(8), ["input", "activated"]),
        (TimmAct(8, nn.Identity()), STAGES),
    ],
    ids=["activation", "no activation", "module", "no module"],
)
def test_an_activation_in_the_layer_hides_what_is_before_it(layer: nn.Module, stages: list[str]) -> None:
    rest = [nn.ReLU()] * (stages == STAGES)
    network, norm = nn.Sequential(layer, *rest, nn.Flatten(), nn.Linear(8, 3)), norms.parse("as-is")
    x = X[..., None, None]
    models.Model("f", lambda: network, finished=True)(norm, x, 3)
    assert [(r.layer, r.stage) for r in distributions(network, norm, x)] == [("0", stage) for stage in stages]


def test_calls_of_one_layer_are_distinguished() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(self.norm(x).relu()).relu())

    network, norm = Twice(), norms.parse("as-is")
    models.Model("f", lambda: network, finished=True)(norm, X, 3)
    assert [r.layer for r in distributions(network, norm, X)][::3] == ["norm", "norm, call 2"]
