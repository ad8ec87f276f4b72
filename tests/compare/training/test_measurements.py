from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.compare.inputs import norms
from batchnorm.compare.inputs.data import KEYS
from batchnorm.compare.inputs.networks import mlp, resnet20
from batchnorm.compare.training import measurements
from batchnorm.compare.training.distributions import distributions
from batchnorm.compare.training.measurements import Activations, Stopwatch, gradient_norm, kept_bytes


def test_histogram_counts_every_value():
    values = torch.tensor([[0.0, 1.0], [2.0, 64.0]])
    found = measurements.histogram(values, step=3)
    assert (found.low, found.high, sum(found.counts), found.nonfinite) == (0, 64, 4, 0)
    assert found.counts[:3] == [1, 1, 1]
    assert found.counts[-1] == 1
    np.testing.assert_allclose(found.percentiles, np.percentile(values, [15, 50, 85]))


def test_histogram_counts_values_that_are_not_finite():
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


class WritesIntoItsInput(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mul_(0.5))


def test_measuring_a_network_that_writes_into_its_input_leaves_the_data(data):
    norm = norms.parse("batch")
    network = WritesIntoItsInput(nn.Linear(8, 3), norm(3))
    before = {key: getattr(data, key).clone() for key in KEYS}
    measurements.evaluate(network, data, 0, 0.0)
    distributions(network, norm, data.x_test)
    kept_bytes(network, data.x_train, data.y_train)
    for key, values in before.items():
        assert torch.equal(getattr(data, key), values), key


def test_evaluate_looks_at_a_part_of_the_training_data_too(data):
    network = nn.Sequential(nn.Linear(8, 3), nn.Dropout(0.5))
    found = measurements.evaluate(network, data, 0, 0.0)
    x, y = data.train_part
    scores = network.eval()(x)
    assert found.train_loss == pytest.approx(F.cross_entropy(scores, y).item(), rel=1e-5)
    assert found.train_accuracy == (scores.argmax(1) == y).double().mean().item()
    assert found.train_loss != found.test_loss


def _watched(network: nn.Module, norm: norms.Norm, x: torch.Tensor) -> tuple[dict[str, str], list]:
    activations = Activations(network, norm, x)
    found: list = []
    watch = Stopwatch()
    watch.start()
    with activations.watch(4, watch, found):
        network(x)
        network(x)
    watch.stop()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.training
    return activations.descriptions, found


@pytest.mark.parametrize("placement", ["before", "after"])
def test_the_inputs_of_the_first_and_the_last_activation_are_watched_once(placement):
    norm = norms.parse("batch", placement)
    network, x = mlp(norm, (8,), 3), torch.randn(32, 8)
    descriptions, found = _watched(network, norm, x)
    assert descriptions == {"first": "input to hidden1.activation (ReLU)", "last": "input to hidden2.activation (ReLU)"}
    assert [(h.where, h.step, sum(h.counts)) for h in found] == [("first", 4, 32 * 64), ("last", 4, 32 * 128)]
    seen = network.linear1(x) if placement == "after" else network.hidden1.norm(network.linear1(x))
    np.testing.assert_allclose(found[0].percentiles, np.percentile(seen.detach(), [15, 50, 85]), rtol=1e-5)


def test_the_last_activation_of_a_residual_network_is_behind_its_last_addition():
    norm = norms.parse("none")
    network = resnet20(norm, (1, 8, 8), 3)
    assert Activations(network, norm, torch.randn(2, 1, 8, 8)).descriptions == {
        "first": "input to hidden.activation (ReLU)",
        "last": "input to block3_3.activation (ReLU)",
    }


def test_values_are_seen_before_an_activation_in_place_overwrites_them():
    norm = norms.parse("none")
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True))
    descriptions, found = _watched(network, norm, torch.randn(32, 8))
    assert descriptions == {"first": "input to 1 (ReLU)"}
    assert [h.where for h in found] == ["first"]
    assert found[0].low < 0


def test_calls_of_one_module_are_distinguished():
    relu = nn.ReLU()
    network = nn.Sequential(nn.Linear(8, 16), relu, nn.Linear(16, 4), relu, nn.Linear(4, 3))
    descriptions, found = _watched(network, norms.parse("none"), torch.randn(32, 8))
    assert descriptions == {"first": "input to 1 (ReLU)", "last": "input to 1 (ReLU, call 2)"}
    assert [(h.where, sum(h.counts)) for h in found] == [("first", 32 * 16), ("last", 32 * 4)]


class Functional(nn.Module):
    """Calls its activations as functions."""

    def __init__(self, norm: norms.Norm) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 16), norm(16)
        self.linear2, self.norm2 = nn.Linear(16, 4), norm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm2(self.linear2(F.relu(self.norm(self.linear(x))))))


@pytest.mark.parametrize("spec", ["none", "batch"])
def test_without_activation_modules_the_norms_are_watched(spec):
    norm = norms.parse(spec)
    descriptions, found = _watched(Functional(norm), norm, torch.randn(32, 8))
    kind = type(norm.made[0]).__name__
    assert descriptions == {"first": f"output of norm ({kind})", "last": f"output of norm2 ({kind})"}
    assert [(h.where, sum(h.counts)) for h in found] == [("first", 32 * 16), ("last", 32 * 4)]


def test_a_network_with_neither_is_not_watched():
    assert _watched(nn.Linear(8, 3), norms.parse("none"), torch.randn(32, 8)) == ({}, [])


def test_hooks_go_where_the_network_fails():
    norm = norms.parse("batch")
    network = mlp(norm, (8,), 3)
    with pytest.raises(RuntimeError):
        Activations(network, norm, torch.randn(4, 7))
    activations = Activations(network, norm, torch.randn(4, 8))
    with pytest.raises(RuntimeError), activations.watch(1, Stopwatch(), []):
        network(torch.randn(4, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.training


def test_the_norm_of_the_gradient_is_over_all_parameters():
    network = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    network[1].bias.requires_grad_(False)
    network(torch.randn(5, 8)).square().sum().backward()
    values = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    assert gradient_norm(network) == pytest.approx(values.norm().item(), rel=1e-6)
    network[0].weight.grad[0, 0] = float("inf")
    assert gradient_norm(network) is None


def test_kept_bytes_counts_what_the_backward_pass_needs_once():
    """The input, the hidden units behind ReLU (for two layers), log-softmax, the labels, and a scalar of the loss."""
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(1000, 8)[:32], torch.arange(1000)[:32] % 3
    assert kept_bytes(network, x, y) == 32 * (4 * (8 + 16 + 3) + 8) + 4


def test_kept_bytes_differs_between_norms_and_changes_nothing():
    x, y = torch.randn(32, 8), torch.arange(32) % 3
    found = {}
    for spec in ("none", "batch"):
        network = nn.Sequential(mlp(norms.parse(spec), (8,), 3), nn.Dropout(0.5))
        before = {name: value.clone() for name, value in network.state_dict().items()}
        state = torch.get_rng_state()
        found[spec] = kept_bytes(network, x, y)
        assert torch.equal(torch.get_rng_state(), state)
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(parameter.grad is None for parameter in network.parameters())
    assert found["batch"] >= found["none"] + 4 * 32 * (64 + 128)


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


def test_the_stopwatch_waits_for_another_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for device in (None, torch.device("cpu"), torch.device("cuda", 1)):
        watch = Stopwatch(device)
        watch.start()
        watch.stop()
    assert waited == [torch.device("cuda", 1)] * 2
