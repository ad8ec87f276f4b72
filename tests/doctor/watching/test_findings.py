"""`watch`: what it finds during training, and how it warns."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.doctor import BatchNormWarning, Severity, Watch, watch
from tests.doctor.defective import Checkpointed
from tests.doctor.networks import Plain, criterion, digits, trained
from tests.doctor.watching import training
from tests.doctor.watching.training import last, train, watched


def codes(w: Watch) -> list[str]:
    return [finding.code for finding in w.findings]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


@pytest.mark.parametrize("lr", [0.02, 0.5])
def test_a_healthy_run_has_no_finding(lr: float) -> None:
    w = watched(Plain(), 70, lr=lr)
    assert codes(w) == []
    assert all(record.mean_distance < 0.3 and record.dead == 0 for record in w.history[-6:])


def test_checkpointing_moves_the_statistics_twice() -> None:
    w = watched(Checkpointed(trained("plain")), 3)
    (finding,) = w.findings
    assert finding.code == "BN106"
    assert finding.paths == w.layers
    assert "batchnorm.accelerate" in finding.repair
    assert {record.updates for record in w.history} == {2}
    ours, _ = batchnorm.accelerate(Checkpointed(trained("plain")))
    w = watched(ours, 3)
    assert codes(w) == []
    assert {record.updates for record in w.history} == {1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_both_kinds_of_checkpointing_are_distinguished_from_calls(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, every=1, warn=False) as w:
        w.step()
        x = torch.randn(64, 4, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        optimizer.step()
    assert codes(w) == ["BN106"]


def test_gradient_accumulation_moves_them_often_and_is_no_finding() -> None:
    w = watched(trained("plain"), 3, accumulate=3)
    assert codes(w) == []
    assert {record.updates for record in w.history} == {3}


def test_two_passes_before_a_backward_pass_are_found() -> None:
    model = trained("plain")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = digits()
    with watch(model, every=1, warn=False) as w:
        for start in (0, 128):
            loss = criterion(model(x[start : start + 64]), y[start : start + 64])
            loss = loss + criterion(model(x[start + 64 : start + 128]), y[start + 64 : start + 128])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    (finding,) = w.findings
    assert finding.code == "BN106"
    assert "calls the model twice" in finding.summary


class Shrinking:
    """γ of every other channel of a layer falls to nothing, as under too strong a decay."""

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        self.layer = layer

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        self.layer.weight[::2] *= 0.2


def test_dead_channels_that_grow_are_found() -> None:
    model = trained("plain")
    layer = norms(model)[3]
    w = watched(model, 8, lr=1e-3, between=Shrinking(layer))
    (finding,) = w.findings
    assert (finding.code, finding.paths) == ("BN206", ("blocks.3.1",))
    assert last(w)["blocks.3.1"].dead == 0.5
    assert last(w)["blocks.2.1"].dead == 0


def test_channels_that_are_dead_from_the_start_are_no_finding() -> None:
    model = trained("plain")
    nn.init.zeros_(norms(model)[3].weight)
    norms(model)[3].weight.register_hook(torch.zeros_like)
    norms(model)[2].weight.data[::2] = 0
    norms(model)[2].weight.register_hook(torch.zeros_like)
    w = watched(model, 4)
    assert codes(w) == []
    assert last(w)["blocks.3.1"].dead == 1


def test_small_batches_are_found_by_their_noise() -> None:
    w = watched(trained("plain"), 24, size=4, lr=1e-3)
    assert set(codes(w)) == {"BN104"}
    assert w.findings[0].figures["batch_size"] == 4
    assert w.findings[0].figures["batch_size_needed"] > 16
    assert codes(watched(trained("plain"), 24, size=64, lr=1e-3)) == []


def test_noise_is_that_of_independent_samples() -> None:
    """With linear layers' inputs drawn from normal distributions it is √(1.5/N)."""
    layer = nn.BatchNorm1d(64)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-6)
    for size in (4, 64, 512):
        layer.reset_running_stats()
        with watch(layer, every=1, warn=False) as w:
            for _ in range(60 if size < 32 else 6):
                layer(3 + 2 * torch.randn(size, 64)).square().mean().backward()
                optimizer.step()
        noise = np.mean([record.noise for record in w.history[-5:]])
        assert noise == pytest.approx(math.sqrt(1.5 / size), rel=0.12)


@pytest.mark.parametrize("momentum", [0.0, None])
def test_running_statistics_that_do_not_follow_are_found(momentum: float | None) -> None:
    model = trained("plain")
    train(model, 10, lr=0.5)  # far from what the statistics are of
    for layer in norms(model):
        layer.momentum = momentum
        layer.reset_running_stats()
    if momentum is None:
        nn.init.orthogonal_(model.blocks[0][0].weight)
        model.blocks[0][0].weight.data *= 5
        for layer in norms(model):
            layer.num_batches_tracked += 10_000
    w = watched(model, 60, lr=0.05)
    assert set(codes(w)) == {"BN102"}
    assert max(finding.severity for finding in w.findings) == Severity.WARNING
    assert "momentum = 0.1" in w.findings[0].repair
    assert "off for" in w.findings[0].summary


def test_statistics_that_are_not_finite_are_found_at_once() -> None:
    model = trained("plain")
    x, y = digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    bad = x[:16].clone()
    bad[3, 0, 2, 2] = torch.inf
    with watch(model, every=1, warn=False) as w:
        for _ in range(2):
            criterion(model(x[:64]), y[:64]).backward()
            optimizer.step()
        assert codes(w) == []
        criterion(model(bad), y[:16]).backward()
        optimizer.zero_grad()
        optimizer.step()
    assert "BN202" in codes(w)
    assert {finding.severity for finding in w.findings} == {Severity.ERROR}


def test_a_rule_warns_once_for_each_layer_and_names_layer_evidence_and_repair() -> None:
    model = trained("plain")
    layers = norms(model)
    with watch(model, every=1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, 8, lr=1e-3, between=Shrinking(layers[3]))
        train(model, 8, lr=1e-3, between=Shrinking(layers[2]))
    messages = [str(w.message) for w in caught]
    assert [w.category for w in caught] == [BatchNormWarning] * 2
    assert "BN206" in messages[0] and "blocks.3.1" in messages[0] and "50%" in messages[0]
    assert "batchnorm.parameter_groups" in messages[0]
    assert "blocks.2.1: " in messages[1] and "blocks.3.1" not in messages[1]
    assert {Path(w.filename) for w in caught} == {Path(training.__file__)}  # the line that makes the step


def test_a_warning_that_is_an_error_leaves_the_watch_whole() -> None:
    with pytest.raises(BatchNormWarning, match="BN106"), watch(Checkpointed(trained("plain")), every=1) as w:
        train(w._root, 3)
    assert (w.steps, w.looks) == (2, 1)
    assert codes(w) == ["BN106"]
