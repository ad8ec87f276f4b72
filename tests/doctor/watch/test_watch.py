"""Watching a model while it trains: what is found, that nothing is changed, and that nothing stays behind."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.doctor import BatchNormWarning, Severity, Watch, watch
from batchnorm.doctor.watch import watcher
from batchnorm.doctor.watch.pace import AFTERMATH, Pace
from batchnorm.doctor.watch.records import QUANTITIES, Record
from tests.doctor.cases import Checkpointed
from tests.doctor.networks import Plain, criterion, digits, trained

STEPS = 12


def left_behind() -> list[Any]:
    places = [value for name, value in vars(hooks).items() if name.startswith("_global_") and isinstance(value, dict)]
    return [hook for place in (*places, optimizers._global_optimizer_post_hooks) for hook in place.values()]


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = left_behind()
    yield
    assert left_behind() == before


def train(
    model: nn.Module,
    steps: int = STEPS,
    *,
    size: int = 64,
    lr: float = 0.05,
    accumulate: int = 1,
    between: Callable[[int], None] = lambda step: None,
    **options: Any,
) -> torch.optim.Optimizer:
    x, y = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, **options)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(accumulate):
            rows = torch.randint(5000, (size,), generator=generator)
            criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
        between(step)
    return optimizer


def watched(model: nn.Module, steps: int = STEPS, **options: Any) -> Watch:
    """So many steps are looked at, after the first."""
    with watch(model, every=1, warn=False) as w:
        w.step()
        train(model, steps, **options)
    return w


def codes(w: Watch) -> list[str]:
    return [finding.code for finding in w.findings]


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def last(w: Watch) -> dict[str, Record]:
    return {record.layer: record for record in w.history[-len(w.layers) :]}


# Findings -------------------------------------------------------------------------------------------------------------


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
    assert {Path(w.filename) for w in caught} == {Path(__file__)}


def test_a_warning_that_is_an_error_leaves_the_watch_whole() -> None:
    with pytest.raises(BatchNormWarning, match="BN106"), watch(Checkpointed(trained("plain")), every=1) as w:
        train(w._root, 3)
    assert (w.steps, w.looks) == (2, 1)
    assert codes(w) == ["BN106"]


# What is measured -----------------------------------------------------------------------------------------------------


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


# Steps and pace -------------------------------------------------------------------------------------------------------


def test_only_optimizers_of_the_model_make_steps() -> None:
    model, other = trained("plain"), trained("plain")
    with watch(model, every=1) as w:
        train(other, 2)
        assert w.steps == 0
        train(model, 2)
        assert w.steps == 2
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with watch(model, optimizer, every=1) as w:
        train(model, 2)
        assert w.steps == 0
        optimizer.step()
        w.step()
    assert w.steps == 1


def test_two_optimizers_in_a_step_do_not_split_a_look() -> None:
    model = trained("plain")
    x, y = digits()
    both = [torch.optim.SGD(part.parameters(), 0.01) for part in (model.blocks, model.head)]
    with watch(model, every=1) as w:
        w.step()
        for _ in range(2):
            criterion(model(x[:64]), y[:64]).backward()
            for optimizer in both:
                optimizer.step()
    assert {record.updates for record in w.history} == {1}


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def paced(pace: Pace, clock: Clock, steps: int, training: Callable[[int], float], look: float) -> list[int]:
    """The steps that were looked at."""
    looked = []
    for step in range(steps):
        clock.now += training(step)
        if pace.looking:
            looked.append(step)
            with pace.spending():
                clock.now += look
        pace.step()
    return looked


@pytest.mark.parametrize("overhead", [0.02, 0.1])
@pytest.mark.parametrize("look", [0.0001, 0.004, 0.05, 2.0])
def test_looking_takes_no_more_than_its_share(overhead: float, look: float) -> None:
    clock = Clock()
    looked = paced(Pace(overhead, clock=clock), clock, 5000, lambda step: 0.1 + 0.05 * math.sin(step), look)
    affordable = overhead * 0.1 * 5000 / (AFTERMATH * look)
    assert len(looked) - 1 <= 1.01 * affordable  # the first is on the house
    assert len(looked) >= 0.9 * min(affordable, 5000)


def test_a_pause_buys_no_burst() -> None:
    clock = Clock()
    looked = paced(Pace(0.02, clock=clock), clock, 1000, lambda step: 100.0 if step == 500 else 0.1, 0.02)
    assert sum(501 <= step <= 510 for step in looked) == 2  # what is saved up, and no more
    assert min(np.diff([step for step in looked if step > 510])) >= 12


def test_a_look_that_becomes_dearer_is_taken_less_often() -> None:
    clock = Clock()
    pace = Pace(0.02, clock=clock)
    cheap = paced(pace, clock, 1000, lambda step: 0.1, 0.01)
    dear = paced(pace, clock, 1000, lambda step: 0.1, 0.1)
    assert len(cheap) > 5 * len(dear) > 50


def test_every_goes_by_the_count() -> None:
    clock = Clock()
    assert paced(Pace(0.02, 3, clock), clock, 11, lambda step: 0.1, 50.0) == [1, 4, 7, 10]


def test_a_long_run_is_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "_KEPT", 10)
    layer = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    clock = Clock()
    with Watch(layer, clock=clock, warn=False) as w:
        for _ in range(100):
            layer(torch.randn(8, 2)).sum().backward()
            clock.now += 1
            optimizer.step()
    steps = [record.step for record in w.history]
    assert len(steps) <= 11
    assert steps[-1] > 90
    assert len(set(np.diff(steps)[:-1])) == 1


# What comes out -------------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))


def test_each_look_is_written_once() -> None:
    model, writer, late = trained("plain"), Writer(), Writer()
    with watch(model, every=2, writer=writer) as w:
        train(model, 5)
    assert len(writer.written) == len(set(writer.written)) == 2 * 6 * len(QUANTITIES)
    assert {step for _, _, step in writer.written} == {2, 4}
    assert ("batchnorm/updates/blocks.0.1", 1, 4) in writer.written
    w.write(late)
    assert late.written == []
    w.write(late, step=70)
    assert {step for _, _, step in late.written} == {70}
    assert {name: value for name, value, _ in late.written} == w.metrics()


def test_tensorboard_takes_it(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(tmp_path) as writer, watch(trained("plain"), every=1, writer=writer) as w:
        train(w._root, 3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (first, second) = events.Scalars("batchnorm/mean_distance/blocks.0.1")
    assert (first.step, second.step) == (2, 3)
    assert second.value == pytest.approx(last(w)["blocks.0.1"].mean_distance)


def test_the_history_is_a_table() -> None:
    import pandas

    w = watched(trained("plain"), 2)
    table = pandas.DataFrame(w.history)
    assert list(table.columns) == ["step", "layer", *[q for q in QUANTITIES if q != "updates"], "updates", "batch_size"]
    assert len(table) == 12
    assert w.metrics(per_layer=False)["batchnorm/noise"] == table[table.step == 3].noise.max()


def test_it_prints_a_short_table() -> None:
    w = watched(Checkpointed(trained("plain")), 2)
    lines = str(w).splitlines()
    assert lines[0] == "watch: 3 steps, 2 looks; 1 finding"
    assert len([line for line in lines if line.startswith("network.blocks")]) == 6
    assert "BN106" in lines[-1]


def test_the_picture_shows_every_layer(tmp_path: Path) -> None:
    w = watched(Checkpointed(trained("plain")), 3)
    figure = w.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == list(QUANTITIES.values())
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(w.layers)
    w.save(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["watch.png"]
    healthy = watched(trained("plain"), 2).plot()
    assert QUANTITIES["updates"] not in [axes.get_title() for axes in healthy.axes]


def test_a_picture_of_nothing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with watch(trained("plain")) as w:
        with pytest.raises(ValueError, match="Watch.plot expects at least one look, got none"):
            w.plot()
        with pytest.raises(ValueError, match="ends in .png, .svg or .pdf"):
            w.save(tmp_path / "watch.gif")
        assert w.metrics() == {}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "expects a torch.nn.Module, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "expects a model with batch normalization"),
        ({"model": nn.LazyBatchNorm1d()}, ValueError, "has not seen a batch"),
        ({"every": 0}, ValueError, "expects every >= 1, got 0"),
        ({"every": 1.5}, TypeError, "expects every to be an int"),
        ({"overhead": 0.0}, ValueError, "expects overhead in"),
    ],
)
def test_invalid_arguments_raise_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        watch(**{"model": nn.BatchNorm1d(2), **arguments})
