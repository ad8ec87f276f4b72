"""Findings in the first 50 steps of a training: of planted mistakes, and none without a mistake."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm.doctor import Finding, Severity, Watch, watch
from tests.doctor.mistakes import SIZE, Batches, random_batches, trained

NETWORK = "perceptron"
STEPS = 50


def watched(model: nn.Module, data: Batches, *, every: int = 2) -> Watch:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.train()
    with watch(model, every=every, warn=False) as w:
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return w


def codes(w: Watch) -> list[str]:
    return [finding.code for finding in w.findings]


def pasted(finding: Finding, model: nn.Module) -> nn.Module:
    names = {"batchnorm": batchnorm, "torch": torch, "model": model, "training_data": random_batches(NETWORK, 4)}
    exec(finding.repair, names)
    return names["model"]


def test_shuffled_data_and_trained_weights_are_no_finding() -> None:
    assert codes(watched(trained(NETWORK), random_batches(NETWORK, STEPS))) == []


def test_frozen_weights_with_live_statistics_are_found_at_the_first_look() -> None:
    model = trained(NETWORK)
    model.body.requires_grad_(False)
    w = watched(model, random_batches(NETWORK, 2))
    (finding,) = w.findings
    assert (finding.code, finding.severity) == ("BN107", Severity.WARNING)
    assert codes(watched(pasted(finding, model), random_batches(NETWORK, 4))) == []
    model = trained(NETWORK)
    model.body.requires_grad_(False)
    for found in batchnorm.walk.norm_layers(model):
        found.module.eval()
    assert codes(watched_as_it_is(model)) == []


def watched_as_it_is(model: nn.Module) -> Watch:
    """Train with the modes that the model has."""
    optimizer = torch.optim.SGD(model.head.parameters(), 1e-3)
    with watch(model, every=1, warn=False) as w:
        for x, y in random_batches(NETWORK, 3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return w


def test_dropout_before_a_layer_is_found_at_the_first_look() -> None:
    model = trained(NETWORK)
    model.body[0].append(nn.Dropout(0.3))
    (finding,) = watched(model, random_batches(NETWORK, 2)).findings
    assert (finding.code, finding.paths) == ("BN111", ("body.1.1",))
    assert "30%" in finding.summary


class Branches(nn.Module):
    """Dropout ends one branch, and the other one begins after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x) + self.second(x))


def test_dropout_after_the_layers_is_no_finding() -> None:
    model = trained(NETWORK)
    model.body.append(nn.Dropout(0.5))
    assert codes(watched(model, random_batches(NETWORK, 4))) == []
    assert codes(watched(Branches(), random_batches(NETWORK, 4))) == []


def test_sorted_data_are_found_within_fifty_steps() -> None:
    x, y = (torch.cat(part) for part in zip(*random_batches(NETWORK, STEPS), strict=True))
    order = y.argsort()
    data = list(zip(x[order].split(SIZE), y[order].split(SIZE), strict=True))
    found = [finding for finding in watched(trained(NETWORK), data).findings if finding.code == "BN105"]
    assert len(found) == 1 and found[0].figures["inflation"] > 2


def test_two_domains_in_turn_are_found_within_fifty_steps() -> None:
    data = [(1 - x if number % 2 else x, y) for number, (x, y) in enumerate(random_batches(NETWORK, STEPS))]
    w = watched(trained(NETWORK), data, every=1)
    assert [code for code in codes(w) if code in ("BN105", "BN115")] == ["BN115"]


@pytest.mark.parametrize(("momentum", "when"), [(0.001, "during"), (0.01, "at the end"), (0.1, "never")])
def test_a_momentum_that_is_too_small_is_found(momentum: float, when: str) -> None:
    model = trained(NETWORK)
    for found in batchnorm.walk.norm_layers(model):
        found.module.reset_running_stats()
        found.module.momentum = momentum
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, every=2, warn=False) as w:
        for x, y in random_batches(NETWORK, STEPS + 2):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert ("BN217" in codes(w)) == (when == "during")
    found = [finding for finding in w.findings if finding.code == "BN217"]
    assert len(found) == (when != "never")
    if when == "during":
        assert found[0].summary.startswith("momentum 0.001 over 50 steps keeps 95% of the initial running statistics")


def test_updates_after_the_last_look_count() -> None:
    model = trained(NETWORK)
    for found in batchnorm.walk.norm_layers(model):
        found.module.reset_running_stats()
    assert codes(watched(model, random_batches(NETWORK, STEPS + 2), every=1000)) == []  # looks at the second step only


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("forgotten", [True, False])
def test_an_evaluation_in_training_mode_is_found(forgotten: bool, every: int) -> None:
    model = trained(NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    held_out = random_batches(NETWORK, 12, 1)
    with watch(model, every=every, warn=False) as w:
        for step, (x, y) in enumerate(random_batches(NETWORK, 30)):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 10 == 6:
                model.train(forgotten)
                with torch.no_grad():
                    for images, _ in held_out:
                        model(images)
                model.train()
    assert codes(w) == ["BN208"] * forgotten
    assert all("model.eval()" in finding.repair for finding in w.findings)


def test_a_teacher_without_gradients_is_no_evaluation() -> None:
    model = trained(NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, every=1, warn=False) as w:
        for x, y in random_batches(NETWORK, 4):
            with torch.no_grad():
                model(x)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert codes(w) == ["BN106"]


def test_a_look_keeps_no_graph() -> None:
    """A call without a backward pass, as of a generator whose output is detached, keeps its inputs in its graph."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for closed in (False, True):
        with watch(model, every=1, warn=False) as w:
            optimizer.step()
            x = torch.randn(8, 4)
            kept = weakref.ref(x)
            model(x)
            del x
            if not closed:
                optimizer.step()
                assert w.looks == 1 and kept() is None
        assert kept() is None
