"""`watch`: what it measures, for every kind of layer, without changing the training."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm
from batchnorm.doctor import watch
from batchnorm.doctor.watching.records import QUANTITIES
from tests.doctor.defective import Checkpointed
from tests.doctor.networks import criterion, digits, trained
from tests.doctor.watching.training import left_behind, train, watched

# Measured values ------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3)
    layer.running_mean.copy_(torch.tensor([0.0, 1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    x = torch.randn(256, 3, 4, 4)
    running_mean, running_var = layer.running_mean.double(), layer.running_var.double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    with watch(layer) as w:
        w.step()
        layer(x).sum().backward()
        optimizer.step()
    (record,) = w.history
    mean, var = x.double().mean((0, 2, 3)), x.double().transpose(0, 1).flatten(1).var(1)
    by_chance = x.double().mean((2, 3)).var(0, correction=0) / 256 * (1 + 0.1 / 1.9)
    expected = (((running_mean - mean).square() - by_chance) / var).mean().sqrt()
    assert record.mean_distance == pytest.approx(float(expected), rel=1e-4)
    assert record.log_ratio == pytest.approx(float((var / running_var).log().median()), abs=1e-4)
    assert (record.step, record.layer, record.updates, record.batch_size, record.dead) == (2, "", 1, 256, 0)


KINDS = {
    "torch": nn.BatchNorm2d,
    "ours": batchnorm.BatchNorm2d,
    "act": batchnorm.BatchNormAct2d,
    "renorm": batchnorm.BatchRenorm2d,
    "ghost": lambda c: batchnorm.GhostBatchNorm2d(c, ghost_size=16),
    "sync": batchnorm.SyncBatchNorm,
    "cumulative": lambda c: batchnorm.BatchNorm2d(c, momentum=None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_measured(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), KINDS[kind](6))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, every=1) as w:
        for _ in range(3):
            model(torch.randn(64, 3, 6, 6)).square().mean().backward()
            optimizer.step()
    for record in w.history:
        assert all(math.isfinite(getattr(record, q)) for q in QUANTITIES)
        assert (record.updates, record.batch_size) == (1, 64)


def test_a_ghost_batch_is_as_noisy_as_its_part() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 32)
    noise = []
    for layer in (batchnorm.BatchNorm1d(32), batchnorm.GhostBatchNorm1d(32, ghost_size=8)):
        optimizer = torch.optim.SGD(layer.parameters(), 0.01)
        with watch(layer, every=1, warn=False) as w:
            w.step()
            layer(x).square().mean().backward()
            optimizer.step()
        noise.append(w.history[0].noise)
    assert noise[1] == pytest.approx(4 * noise[0])


def test_layers_without_comparable_statistics_have_none() -> None:
    model = nn.ModuleList(
        [
            batchnorm.DomainBatchNorm1d(4, num_domains=2),
            nn.BatchNorm1d(4, track_running_stats=False),
            batchnorm.FrozenBatchNorm1d(4),
        ]
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    x = torch.randn(64, 4)
    with watch(model, every=1) as w:
        w.step()
        (model[0](x, 1) + model[1](x) + model[2](x)).sum().backward()
        optimizer.step()
    domain, untracked, frozen = w.history
    assert math.isnan(domain.mean_distance) and math.isnan(domain.noise) and domain.updates == 1
    assert math.isnan(untracked.mean_distance) and untracked.noise > 0 and untracked.updates is None
    assert math.isnan(frozen.mean_distance) and frozen.updates == 0


def test_with_a_mask_the_statistics_come_from_the_running_ones() -> None:
    layer = batchnorm.BatchNorm1d(4, affine=True)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    x = torch.randn(64, 4, 10)
    mask = torch.arange(10) < 5
    x[..., 5:] = 1e6
    with watch(layer, every=1) as w:
        w.step()
        layer(x, mask=mask).square().mean().backward()
        optimizer.step()
    (record,) = w.history
    assert record.mean_distance == pytest.approx(float(x[..., :5].mean((0, 2)).square().mean().sqrt()), rel=0.05)
    assert math.isnan(record.noise)


def test_batches_in_evaluation_do_not_count() -> None:
    model = trained("plain")
    x, _ = digits()

    def evaluate(step: int) -> None:
        model.eval()
        model(1000 * x[:8])
        model.train()

    plain, between = watched(trained("plain"), 4), watched(model, 4, between=evaluate)
    assert repr(between.history) == repr(plain.history)


def test_compiled_code_is_measured_by_its_running_statistics(nothing_compiled_before: None) -> None:
    plain = watched(trained("plain"), 3)
    compiled = watched(torch.compile(trained("plain"), backend="eager"), 3)
    assert len(compiled.history) == len(plain.history)
    for one, other in zip(compiled.history, plain.history, strict=True):
        assert (one.layer, one.updates, one.dead) == (other.layer, other.updates, other.dead)
        assert one.log_ratio == pytest.approx(other.log_ratio, abs=1e-3)
        assert one.mean_distance == pytest.approx(other.mean_distance, abs=0.08)  # with what sampling explains
        assert math.isnan(one.noise) and one.batch_size is None


def test_a_compiled_function_is_compiled_as_unwatched(nothing_compiled_before: None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = trained("plain")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = digits()
    call = torch.compile(lambda x, y: criterion(model(x), y), backend=backend, fullgraph=True)
    with watch(model, every=1) as w:
        for _ in range(3):
            call(x[:64], y[:64]).backward()
            optimizer.step()
    assert w.looks == 2
    assert math.isfinite(w.history[-1].mean_distance)
    assert len(graphs) == 1


# Nothing is changed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: trained("plain"), lambda: Checkpointed(trained("plain"))])
def test_training_has_the_same_bits_as_unwatched(make: Callable[[], nn.Module]) -> None:
    one, other = make(), make()
    torch.manual_seed(5)
    first = train(one, 5)
    random = torch.get_rng_state()
    torch.manual_seed(5)
    with watch(other, every=1, warn=False):
        second = train(other, 5)
    assert torch.equal(torch.get_rng_state(), random)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_a_watched_model_is_copied_pickled_and_saved_as_ever() -> None:
    model = trained("plain")
    names = [set(vars(module)) for module in model.modules()]
    with watch(model, every=1) as w:
        train(model, 2)
        assert w._handles_of_look  # in the middle of a look
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        assert b"telemetry" not in file.getvalue()
        for other in (copied, pickled):
            assert all(not value for m in other.modules() for name, value in vars(m).items() if "_hooks" in name)
            assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
        history = len(w.history)
        train(copied, 1)
        assert len(w.history) == history
    assert [set(vars(module)) for module in model.modules()] == names


def test_an_exception_leaves_nothing_behind() -> None:
    model = trained("plain")
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), watch(model) as w:
        train(model)
    assert w.closed
    w.close()


def test_a_watch_without_references_is_removed() -> None:
    model = trained("plain")
    before = left_behind()
    w = watch(model)
    w.step()
    assert len(left_behind()) == len(before) + 4
    del w
    gc.collect()
    assert left_behind() == before


def test_without_with_it_is_closed_by_hand() -> None:
    model = trained("plain")
    w = watch(model, every=1)
    train(model, 2)
    w.close()
    train(model, 2)
    w.step()
    assert (w.steps, w.looks) == (2, 1)


def test_two_watches_see_the_same() -> None:
    model = trained("plain")
    with watch(model, every=1) as one, watch(model, every=2) as other:
        train(model, 5)
    assert [r.step for r in other.history[::6]] == [2, 4]
    assert repr([r for r in one.history if r.step in (2, 4)]) == repr(other.history)
