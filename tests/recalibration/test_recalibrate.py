"""`recalibrate`: population statistics, of the layers that are named, in a single pass and layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.nn.domain import DomainBatchNorm1d, use_domain
from batchnorm.nn.frozen import FrozenBatchNorm2d
from batchnorm.nn.ghost import GhostBatchNorm2d
from batchnorm.nn.renorm import BatchRenorm2d
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.recalibration import recalibrate
from tests.recalibration.models import SIZES, Recorder, batches, network, norms

# Measured values


@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("offset", [0.5, 1e4])
def test_statistics_are_those_of_two_pass_float64_over_the_same_activations(passes: str, offset: float) -> None:
    model = network()
    recorder = Recorder(model)
    recalibrate(model, batches(offset), passes=passes, inplace=True)
    for path, layer in norms(model).items():
        # With sequential passes the first batch goes through once more, to see what it needs.
        mean, var = recorder.two_pass(path, start=len(recorder.seen[path]) - len(SIZES))
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-6)


def test_a_single_pass_normalizes_as_training_does() -> None:
    model = network().double()
    trained = copy.deepcopy(model).train()
    trained[3].eval()  # dropout
    recorder = Recorder(trained)
    for x in batches():
        trained(x.double())
    model, _ = recalibrate(model, [x.double() for x in batches()])
    for path, layer in norms(model).items():
        mean, var = recorder.two_pass(path)
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-9)


def by_brute_force(model: nn.Module, data: list[Tensor]) -> nn.Module:
    """Layer by layer, everything in one batch, in evaluation."""
    model = copy.deepcopy(model).eval()
    for layer in norms(model).values():
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].double()))
        with torch.no_grad():
            model(torch.cat(data))
            handle.remove()
            values = seen[0].transpose(0, 1).flatten(1)
            layer.running_mean.copy_(values.mean(1))
            layer.running_var.copy_(values.var(1))
    return model


@pytest.mark.parametrize(("cache_bytes", "kept"), [(2**30, 4), (0, 0), (12_000, 1)])
def test_sequential_passes_calibrate_each_layer_on_calibrated_inputs(cache_bytes: int, kept: int) -> None:
    model, data = network().double(), [x.double() for x in batches()]
    found, report = recalibrate(model, data, passes="sequential", cache_bytes=cache_bytes * 8)
    expected = by_brute_force(model, data)
    assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-11)
    assert report.kept == (kept if kept != 1 else report.kept) and (kept != 1 or 0 < report.kept < len(SIZES))


def test_sequential_passes_read_the_data_once_if_all_passes_wait() -> None:
    read = []

    def data() -> Iterator[Tensor]:
        for x in batches():
            read.append(len(x))
            yield x

    recalibrate(network(), data(), passes="sequential")
    assert read == list(SIZES)


def test_sequential_passes_repeat_a_shuffled_loader_in_the_same_order() -> None:
    samples = torch.utils.data.TensorDataset(torch.cat(batches()))
    model = network().double()
    collate = torch.utils.data.default_collate
    results = []
    for generator in (None, torch.Generator().manual_seed(5)):
        loader = torch.utils.data.DataLoader(
            samples, 5, shuffle=True, generator=generator, collate_fn=lambda parts: collate(parts)[0].double()
        )
        results.append(recalibrate(model, loader, passes="sequential", cache_bytes=80_000))
    (first, report), (second, _) = results
    assert 0 < report.kept < report.batches
    expected = by_brute_force(model, [torch.cat(batches()).double()])
    for found in (first, second):
        assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d, nn.SyncBatchNorm, bn.BatchNorm2d, bn.BatchNorm,
        lambda c: bn.BatchNormAct2d(c, activation="none"), BatchRenorm2d, SyncBatchNorm,
        lambda c: GhostBatchNorm2d(c, ghost_size=2), type("Subclass", (nn.BatchNorm2d,), {}),
    ],
    ids=["torch", "torch-sync", "ours", "any-rank", "act", "renorm", "sync", "ghost", "subclass"],
)  # fmt: skip
@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_every_class_gets_the_same_statistics(norm: Callable[[int], nn.Module], passes: str) -> None:
    expected, _ = recalibrate(network(), batches(), passes=passes)
    found, _ = recalibrate(network(norm), batches(), passes=passes)
    for ours, theirs in zip(norms(found).values(), norms(expected).values(), strict=True):
        assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-5)
        assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_domains_get_statistics_of_their_own(passes: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), DomainBatchNorm1d(3, num_domains=3), nn.Tanh()).double()
    x, domain = torch.randn(40, 2).double(), torch.arange(40) % 2
    data = [(x[:23], domain[:23]), (x[23:], domain[23:])]

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with use_domain(batch[1]):
            return model(batch[0])

    found, report = recalibrate(model, data, forward=forward, passes=passes)
    z = model[0](x)
    for k in (0, 1):
        assert_close(found[1].running_mean[k], z[domain == k].mean(0), rtol=1e-12, atol=1e-12)
        assert_close(found[1].running_var[k], z[domain == k].var(0), rtol=1e-12, atol=1e-12)
    assert_close(found[1].running_var[2], torch.ones(3).double())
    assert "no data of domain 2: kept" in str(report)
    with use_domain(1):  # around the whole, in whichever thread the passes run
        found, _ = recalibrate(model, [x], passes=passes)
    assert_close(found[1].running_mean[1], z.mean(0), rtol=1e-12, atol=1e-12)
    assert_close(found[1].running_mean[0], torch.zeros(3).double())


# The choice of layers


def test_only_named_layers_are_touched() -> None:
    model = network()
    found, report = recalibrate(model, batches(), only=["5"])
    before, after = model.state_dict(), found.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"5.running_mean", "5.running_var"}
    assert [c.path for c in report.changed] == ["5"]
    assert {(c.path, c.reason) for c in report.left} == {("1", "not named"), ("8", "not named")}
    by_predicate, _ = recalibrate(model, batches(), only=lambda path, layer: layer.num_features == 5)
    assert_close(dict(by_predicate.state_dict()), dict(after), rtol=0, atol=0)


def test_layers_before_the_named_ones_keep_normalizing_as_they_did() -> None:
    model = network()
    found, _ = recalibrate(model, batches(), only="5")
    z = model.eval()[:5](torch.cat(batches()))
    assert_close(found[5].running_mean, z.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)


def test_frozen_layers_stay_unless_named() -> None:
    model = network().train()
    model[1] = FrozenBatchNorm2d(6)
    model[5].eval()
    found, report = recalibrate(model, batches())
    assert {c.path: c.reason for c in report.left} == {
        "1": "frozen", "5": "frozen: in evaluation mode within a model in training mode",
    }  # fmt: skip
    assert torch.equal(found[1].running_mean, torch.zeros(6))
    assert torch.equal(found[5].running_var, model[5].running_var)
    named, report = recalibrate(model, batches(), only="*")
    assert not report.left
    assert_close(named[1].running_mean, model[0](torch.cat(batches())).mean((0, 2, 3)))


def test_frozen_layers_with_an_activation_stay_too() -> None:
    model = nn.Sequential(bn.FrozenBatchNormAct2d(3, activation="relu"), nn.BatchNorm2d(3))
    _, report = recalibrate(model, batches())
    assert [(c.path, c.reason) for c in report.left] == [("0", "frozen")]


def test_layers_without_statistics_or_data_are_reported() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    model.unused = nn.BatchNorm2d(3)
    _, report = recalibrate(model, batches(), forward=lambda model, x: model[1](model[0](x)))
    assert {c.path: c.reason for c in report.left} == {
        "0": "no running mean and variance", "unused": "not reached by the data",
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="reach the selected layers, got values at none of them \\(.*unused: not reached"
    ):
        recalibrate(model, batches(), only="unused", forward=lambda model, x: model[1](x))
    with pytest.raises(ValueError, match="got values at none of them \\(\\(model\\): all its values are masked"):
        recalibrate(nn.BatchNorm2d(3), batches(), mask=lambda x: torch.zeros(len(x), dtype=torch.bool))
    with pytest.raises(ValueError, match="got Linear with none \\(no such layers\\)"):
        recalibrate(nn.Linear(2, 2), batches())
    with pytest.raises(ValueError, match="run the model once first"):
        recalibrate(nn.LazyBatchNorm2d(), batches())


class Reused(nn.Module):
    """One module called twice, and one that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.BatchNorm1d(2)
        self.left = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.right = nn.Sequential(nn.Linear(2, 2), self.left[1])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.twice(x))
        return self.left(y) + self.right(self.twice(2 * y + 3))


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_reused_module_is_given_the_pooled_statistics_and_reported(passes: str) -> None:
    model = Reused().double()
    recorder = Recorder(model)
    data = [torch.randn(n, 2).double() for n in (20, 30)]
    found, report = recalibrate(model, data, passes=passes, inplace=True)
    for path in ("twice", "left.1"):
        calls = 2 * len(data)
        mean, var = recorder.two_pass(path, start=len(recorder.seen[path]) - calls)
        np.testing.assert_allclose(report[path].mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(report[path].var, var, rtol=1e-9)
    first, second = report["twice"].calls
    assert first[0].count.item() == second[0].count.item() == 50
    assert_close(first[0].mean, torch.cat(data).mean(0))
    assert "called 2 times in a forward pass: pooled" in str(report)
    assert report["right.1"].paths == ("left.1", "right.1") and "also right.1" in str(report)
    assert found.left[1] is found.right[1]


def test_a_shared_module_can_be_given_statistics_for_each_place() -> None:
    model = Reused().double()
    handled = model.left[1].register_forward_hook(lambda *_: None)
    found, report = recalibrate(model, [torch.randn(50, 2).double()], shared="separate")
    assert found.left[1] is not found.right[1]
    assert found.left[1].weight is found.right[1].weight
    assert len(found.right[1]._forward_hooks) == 1
    assert not torch.allclose(found.left[1].running_mean, found.right[1].running_mean)
    assert report["right.1"].paths == ("right.1",) and len(report["right.1"].calls) == 1
    assert model.left[1] is model.right[1]
    handled.remove()


def test_a_shared_module_stays_shared_after_a_failure() -> None:
    model = Reused().double()
    with pytest.raises(ValueError, match="at least one batch, got empty data"):
        recalibrate(model, [], shared="separate", inplace=True)
    assert model.left[1] is model.right[1]


def test_data_dependent_paths_give_each_layer_its_own_data() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) if x.mean() < 3 else self.large(x)

    data = [torch.tensor([[1.0], [2.0]]), torch.tensor([[10.0], [20.0]]), torch.tensor([[0.0], [5.0]])]
    for cache_bytes in (0, 2**30):
        found, _ = recalibrate(Branches(), data, passes="sequential", cache_bytes=cache_bytes)
        assert (found.small.running_mean.item(), found.large.running_mean.item()) == (2.0, 15.0)


# Domain adaptation


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_prior_blends_in_equivalent_samples(passes: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).double()
    model[0].running_mean.fill_(5.0)
    model[0].running_var.fill_(4.0)
    x = torch.cat(batches()).double()
    found, _ = recalibrate(model, [x], prior=len(x) * 3, passes=passes)
    assert_close(found[0].running_mean, 0.75 * 5.0 + 0.25 * x.mean((0, 2, 3)))
    assert_close(found[0].running_var, 0.75 * 4.0 + 0.25 * x.transpose(0, 1).flatten(1).var(1))
    if passes == "sequential":  # the next layer sees what the blended one puts out
        z = found.eval()[:2](x)
        assert_close(found[2].running_mean, 0.25 * z.mean((0, 2, 3)))
