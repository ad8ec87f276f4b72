"""Recalibration: exact population statistics, and a model that is otherwise as it was."""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.models.data.batches import ThreadSettings
from batchnorm.nn.domain import DomainBatchNorm1d, use_domain
from batchnorm.nn.frozen import FrozenBatchNorm2d
from batchnorm.nn.ghost import GhostBatchNorm2d
from batchnorm.nn.renorm import BatchRenorm2d
from batchnorm.nn.sync import SyncBatchNorm
from batchnorm.recalibration import recalibrate

SIZES = (7, 16, 1, 9)  # one of a single sample, which has many pixels


def network(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 5, 3), norm(5), nn.ReLU(inplace=True),
        nn.Conv2d(5, 4, 3), norm(4), nn.Flatten(), nn.Linear(4 * 4, 2),
    )  # fmt: skip
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:  # far from right
            module.running_mean.uniform_(-3, 3)
            module.running_var.uniform_(0.1, 9)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
    return model


def batches(offset: float = 0.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [i + offset + torch.randn(n, 3, 8, 8, generator=generator) for i, n in enumerate(SIZES)]


def norms(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if getattr(m, "running_mean", None) is not None}


class Recorder:
    """What every normalization of a model is given while it is recalibrated, by hooks of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, list[Tensor]] = {path: [] for path in norms(model)}
        for path, layer in norms(model).items():
            layer.register_forward_pre_hook(lambda _, args, path=path: self.seen[path].append(args[0].detach().clone()))

    def two_pass(self, path: str, start: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        values = np.concatenate([x.double().transpose(0, 1).flatten(1).numpy() for x in self.seen[path][start:]], 1)
        mean = values.mean(1)
        return mean, ((values - mean[:, None]) ** 2).sum(1) / (values.shape[1] - 1)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must be as before."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "momentum": [getattr(m, "momentum", None) for m in model.modules()],
        "gradients": [p.requires_grad for p in model.parameters()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),  # noqa: NPY002
    }


def assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    assert_close(snapshot(model), before, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name == "recalibrate"]


# What is measured


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


# What is called, and with what


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn((a + b) * scale)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


A, B = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[10.0], [20.0], [30.0]])


@pytest.mark.parametrize(
    "batch",
    [
        (A, B),
        [A, B, "labels"],
        Pair(A, B),
        {"a": A, "b": B, "labels": A},
        OrderedDict(b=B.numpy(), a=A),
        (A.numpy(), B.numpy()),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "ordered-dict", "arrays"],
)
def test_batches_of_every_kind_reach_the_model(batch: Any) -> None:
    before = copy.copy(batch)
    found, report = recalibrate(Two(), [batch])
    assert found.bn.running_mean.item() == 23.0
    assert (report.samples, report.batches) == (3, 1)
    assert type(batch) is type(before) and all(a is b for a, b in zip(batch, before, strict=True))


def test_batches_that_know_how_to_move_move_themselves() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    found, _ = recalibrate(nn.BatchNorm1d(1), [packed], forward=lambda model, x: model(x.data))
    assert found.running_mean.item() == 3.0


def test_forward_calls_the_model_as_the_user_does() -> None:
    found, _ = recalibrate(Two(), [{"x": [A, B]}], forward=lambda model, batch: model(*batch["x"], scale=2.0))
    assert found.bn.running_mean.item() == 46.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (A, "an iterable of batches, got one Tensor of shape \\[3, 1\\]. Pass \\[x\\]"),
        ({"a": A}, "an iterable of batches, got dict"),
        (3, "an iterable of batches, got int"),
        ([(A,)], "at least 2 items, because Two.forward requires \\(a, b\\), got 1"),
        ([{"a": A}], "with the keys that Two.forward requires \\(a, b\\), got 'a'"),
        (["text"], "tensors, tuples, lists or dicts, got str. Pass forward="),
    ],
)
def test_data_that_do_not_fit_are_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        recalibrate(Two(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": "twice"}, "passes to be one of 'single', 'sequential', got 'twice'"),
        ({"shared": "both"}, "shared to be one of"),
        ({"prior": -1.0}, "prior >= 0"),
        ({"prior": float("inf")}, "finite prior >= 0"),
        ({"max_samples": 0}, "max_samples >= 1"),
        ({"cache_bytes": -1}, "cache_bytes >= 0"),
        ({"only": "head.*"}, "got 'head.\\*', which matches none of 3. Choose from: 1, 5, 8"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalibrate(network(), batches(), **options)


def test_max_samples_stops_after_the_batch_that_reaches_it() -> None:
    endless = itertools.cycle(batches())
    _, report = recalibrate(network(), endless, max_samples=20)
    assert (report.samples, report.batches) == (23, 2)


@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("ambient", [True, False])
def test_autocast_reaches_every_pass(passes: str, ambient: bool) -> None:
    dtypes = set()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        y = model[0](x)
        dtypes.add(y.dtype)
        return model[1:](y)

    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        recalibrate(network(), batches(), forward=forward, passes=passes, autocast=None if ambient else torch.bfloat16)
    assert dtypes == {torch.bfloat16}


def test_the_default_device_reaches_other_threads() -> None:
    with torch.device("meta"):
        ambient = ThreadSettings(None, None)
    devices = []

    def work() -> None:
        with ambient.entered():
            devices.append(torch.empty(0).device.type)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert devices == ["meta"]


def test_batches_move_to_the_device() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="meta tensors"):  # whose values cannot be had: the batch went there
        recalibrate(model, [torch.rand(4, 3)], device="meta")
    found, _ = recalibrate(model, [np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32)])
    assert_close(found[1].running_mean, torch.full((3,), 0.5))


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_masked_values_do_not_count(passes: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).double()
    lengths = torch.tensor([5, 2, 7, 4])
    mask = torch.arange(7) < lengths[:, None]
    x = torch.randn(4, 3, 7).double()
    padded = torch.where(mask[:, None], x, 99.0)
    packed = x.transpose(1, 2)[mask].T[None]  # [1, 3, sum of lengths]
    expected, _ = recalibrate(model, [packed], passes=passes)
    for given in (mask, mask.double(), {"0": mask, "2": mask}):
        found, _ = recalibrate(model, [padded], mask=lambda batch, given=given: given, passes=passes)
        assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-12)
    with pytest.raises(
        ValueError, match="mask that fits the input of '0', \\[4, 7\\] without channels, got \\[4, 6\\]"
    ):
        recalibrate(model, [padded], mask=lambda batch: mask[:, :6], passes=passes)


def test_a_mask_of_samples_or_of_flattened_positions_fits() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(1, 2), nn.Flatten(0, 1), nn.BatchNorm1d(3))
    x = torch.randn(4, 2, 5, 3)
    keep = torch.tensor([True, False, True, True])
    found, _ = recalibrate(model, [x], mask=lambda batch: {"0": keep, "3": keep.repeat_interleave(10).view(4, 10)})
    assert_close(found[0].running_mean, x[keep].mean((0, 2, 3)))
    z = found[0].running_mean.new_tensor(model[0].train()(x[keep]).detach().numpy()).mean((0, 1, 2))
    assert_close(found[3].running_mean, z, rtol=1e-4, atol=1e-5)


def test_a_mask_that_the_model_passes_on_counts() -> None:
    layer = bn.BatchNorm1d(2)
    x, keep = torch.randn(6, 2, 3), torch.rand(6, 3) > 0.4
    found, _ = recalibrate(layer, [(x, keep)], forward=lambda model, batch: model(batch[0], mask=batch[1]))
    assert_close(found.running_mean, x.transpose(1, 2)[keep].mean(0))


# Which layers


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


# As it was


def test_the_given_model_is_unchanged() -> None:
    model = network().train()
    model[0].eval()
    before = snapshot(model)
    result = recalibrate(model, batches())
    assert_as_before(model, before)
    assert result.model is not model


def test_in_place_changes_only_the_statistics() -> None:
    model = network().train()
    model[0].eval()
    model[4].weight.requires_grad_(False)
    before = snapshot(model)
    assert recalibrate(model, batches(), inplace=True).model is model
    after = snapshot(model)
    changed = {k for k, v in before["state"].items() if not torch.equal(v, after["state"][k])}
    assert changed == {f"{path}.running_{what}" for path in norms(model) for what in ("mean", "var")}
    for what in ("modes", "hooks", "momentum", "gradients"):
        assert before[what] == after[what]
    assert torch.equal(before["random"][0], after["random"][0])


def test_a_cumulative_average_continues_from_the_batches_seen() -> None:
    model = nn.BatchNorm1d(1, momentum=None)
    data = [torch.randn(5, 1) for _ in range(3)]
    recalibrate(model, data, inplace=True)
    assert model.num_batches_tracked == 3


class Faulty:
    """Data that raise in the middle."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches()[:2]
        raise OSError("disk gone")


def fails_late(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    if len(x) == SIZES[3]:
        raise RuntimeError("out of luck")
    return y


def with_nan() -> list[Tensor]:
    data = batches()
    data[2][0, 1, 3, 3] = float("nan")
    return data


@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (Faulty(), {}, OSError, "disk gone"),
        (batches(), {"forward": fails_late}, RuntimeError, "out of luck"),
        (with_nan(), {}, ValueError, "a mean that is not finite in torch.float32 at '1'"),
        ([], {}, ValueError, "at least one batch, got empty data"),
        ([*batches(), torch.rand(4, 5, 8, 8)], {}, RuntimeError, "to have 3 channels, but got 5"),
    ],
    ids=["data-raise", "forward-raises", "nan", "no-data", "wrong-shape"],
)
def test_a_failure_leaves_the_model_as_it_was(
    passes: str, cache_bytes: int, data: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network().train()
    model[5].eval()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate(
            model, data, passes=passes, cache_bytes=cache_bytes, only="*", shared="separate", inplace=True, **options
        )
    assert_as_before(model, before)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_an_interruption_leaves_the_model_as_it_was(passes: str) -> None:
    model = network()
    before = snapshot(model)

    def interrupted(model: nn.Module, x: Tensor) -> Tensor:
        if len(x) == SIZES[3]:
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches(), passes=passes, forward=interrupted, inplace=True)
    assert_as_before(model, before)


def test_one_value_per_channel_has_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    data = [torch.randn(8, 2), torch.randn(1, 2)]
    with pytest.raises(ValueError, match="more than one value per channel in every batch, got one at '0'"):
        recalibrate(model, data)
    found, _ = recalibrate(model, data, passes="sequential")
    assert_close(found[0].running_var, torch.cat(data).var(0))
    with pytest.raises(ValueError, match="got one in all the data at '0'"):
        recalibrate(model, data[1:], passes="sequential")


def test_data_that_cannot_be_read_twice_are_refused_if_that_is_needed() -> None:
    with pytest.raises(ValueError, match="can be read again, got an iterator"):
        recalibrate(network(), iter(batches()), passes="sequential", cache_bytes=0)

    class Shrinks:
        def __init__(self) -> None:
            self.data = batches()

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.data
            self.data.pop()

    with pytest.raises(ValueError, match="the same batches each time data are read, got 24 samples in 3 batches"):
        recalibrate(network(), Shrinks(), passes="sequential", cache_bytes=0)


# With the rest


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_compiled_models_are_measured_too(passes: str) -> None:
    model = network()
    expected, _ = recalibrate(model, batches(), passes=passes)
    compiled = torch.compile(model, backend="eager")
    compiled(batches()[0])
    found, _ = recalibrate(compiled, batches(), passes=passes, inplace=True)
    for ours, theirs in zip(norms(found).values(), norms(expected).values(), strict=True):
        assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_third_party_network_is_measured_exactly(passes: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    data = [{"pixel_values": 9 + torch.randn(n, 3, 24, 24), "labels": torch.zeros(n).long(), "id": n} for n in (5, 2)]
    recorder = Recorder(model)
    found, report = recalibrate(model, data, passes=passes, inplace=True)
    assert len(report.layers) == len(norms(found)) == 8
    for path, layer in norms(found).items():
        mean, var = recorder.two_pass(path, start=len(recorder.seen[path]) - len(data))
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-6)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_model_from_inference_mode_can_be_trained(passes: str) -> None:
    expected, _ = recalibrate(network(), batches(), passes=passes)
    with torch.inference_mode():
        found, _ = recalibrate(network(), [x.clone() for x in batches()], passes=passes)
        model = network()
        recalibrate(model, batches(), passes=passes, inplace=True)
    for each in (found, model):
        assert_close(dict(each.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    found.train()(batches()[0]).sum().backward()
    assert found[0].weight.grad is not None


def test_averaged_weights_get_statistics_of_their_own() -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    found, _ = recalibrate(average, batches())
    expected, _ = recalibrate(model, batches())
    assert_close(found.module[5].running_var, expected[5].running_var)


def test_half_precision_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    with pytest.raises(ValueError, match="a variance that is not finite in torch.float16 at '0'"):
        recalibrate(model, [300 * torch.randn(64, 2).half()])


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_bar_shows_progress(passes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    recalibrate(network(), batches(), passes=passes, progress=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err and not shown.out
    assert ("recalibrate" if passes == "single" else "layer 3 of 3") in shown.err


def test_the_report_says_how_far_each_layer_was_off() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = [torch.tensor([[2.0], [6.0]])]
    _, report = recalibrate(model, data)
    assert report["0"].shift.item() == pytest.approx(4 / 8**0.5)
    assert report["0"].ratio.item() == pytest.approx(8**0.5)
    assert str(report).splitlines() == [
        "recalibrate: 1 changed, 0 left; 2 samples in 1 batch, single pass",
        "",
        "layer  was             now                                      why",
        "0      BatchNorm1d(1)  mean moved 1.4σ (at most 1.4σ), σ ×2.83",
    ]
    with pytest.raises(KeyError):
        report["1"]
