from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.compare import measurements, models, norms
from batchnorm.compare.measurements import FirstActivation, Stopwatch


def test_histogram_counts_every_value():
    values = torch.tensor([[0.0, 1.0], [2.0, 64.0]])
    found = measurements.histogram(values, step=3)
    assert (found.low, found.high, sum(found.counts), found.nonfinite) == (0, 64, 4, 0)
    assert found.counts[:3] == [1, 1, 1]
    assert found.counts[-1] == 1
    np.testing.assert_allclose(found.percentiles, np.percentile(values, [15, 50, 85]))


def test_histogram_tells_values_that_are_not_finite():
    found = measurements.histogram(torch.tensor([1.0, float("nan"), float("inf")]), step=1)
    assert (sum(found.counts), found.nonfinite) == (1, 2)
    assert measurements.histogram(torch.tensor([float("nan")]), step=1).percentiles is None


def test_evaluate_gives_loss_and_accuracy_of_the_whole_test_set(data):
    network = nn.Linear(8, 3)
    found = measurements.evaluate(network, data, 7, 1.5)
    scores = network(data.x_test)
    assert found.test_loss == pytest.approx(F.cross_entropy(scores, data.y_test).item(), rel=1e-5)
    assert found.test_accuracy == (scores.argmax(1) == data.y_test).double().mean().item()
    assert (found.step, found.train_seconds) == (7, 1.5)
    assert network.training


def test_evaluate_leaves_running_statistics_alone(data):
    network = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measurements.evaluate(network, data, 0, 0.0)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name


def _watched(network: nn.Module, norm: norms.Norm, x: torch.Tensor) -> tuple[str | None, list]:
    first = FirstActivation(network, norm, x)
    found: list = []
    watch = Stopwatch()
    watch.start()
    with first.watch(4, watch, found):
        network(x)
        network(x)
    watch.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return first.description, found


def test_the_input_of_the_first_activation_is_watched_once():
    norm = norms.parse("batch")
    network = models.mlp(norm, (8,), 3)
    description, found = _watched(network, norm, torch.randn(32, 8))
    assert description == "input to relu1 (ReLU)"
    assert [(h.step, sum(h.counts)) for h in found] == [(4, 32 * 64)]


def test_values_are_seen_before_an_activation_in_place_overwrites_them():
    norm = norms.parse("none")
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True))
    _, found = _watched(network, norm, torch.randn(32, 8))
    assert found[0].low < 0


class Functional(nn.Module):
    """Calls its activation as a function."""

    def __init__(self, norm: norms.Norm) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 16), norm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.linear(x)))


@pytest.mark.parametrize("spec", ["none", "batch"])
def test_without_activation_modules_the_first_norm_is_watched(spec):
    norm = norms.parse(spec)
    description, found = _watched(Functional(norm), norm, torch.randn(32, 8))
    assert description == f"output of norm ({type(norm.made[0]).__name__})"
    assert len(found) == 1


def test_a_network_with_neither_is_not_watched():
    description, found = _watched(nn.Linear(8, 3), norms.parse("none"), torch.randn(32, 8))
    assert description is None
    assert found == []


def test_layers_gives_parameters_and_statistics_by_channel():
    norm = norms.parse("batch")
    network = nn.Sequential(nn.Linear(8, 3), norm(3), nn.BatchNorm1d(3, affine=False))
    ours, torchs = measurements.layers(network, norm)
    assert (ours.name, ours.kind) == ("1", "BatchNorm1d")
    assert (ours.weight, ours.bias) == ([1, 1, 1], [0, 0, 0])
    assert (ours.running_mean, ours.running_var) == ([0, 0, 0], [1, 1, 1])
    assert (torchs.weight, torchs.running_var) == (None, [1, 1, 1])


def test_the_stopwatch_leaves_pauses_out(monkeypatch):
    times = iter([0.0, 1.0, 10.0, 12.0])
    monkeypatch.setattr(measurements.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.start()
    with watch.paused():
        pass
    watch.stop()
    assert watch.seconds == 3.0
