"""The benchmark of whole networks, on a network of its own: rows and reports. No test depends on measured time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import batchnorm
from benchmarks.measuring import records, timing
from benchmarks.measuring.options import Options
from benchmarks.reports import steps_report, targets
from benchmarks.sections import steps
from benchmarks.subjects import networks


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def _default_memory() -> Iterator[None]:
    yield
    batchnorm.keep_memory(False)


def measured(folder, *, only: str = "") -> list[records.Row]:
    options = Options(folder, quick=True, seconds=0.001, threads=1, only=only, allocator="both")
    table = records.Table(folder / "networks.csv", steps.KEY)
    steps.measure_networks(options, table)
    return table.rows()


@pytest.fixture
def small(monkeypatch) -> None:
    monkeypatch.setattr(steps, "NETWORKS", {"small": Small})
    monkeypatch.setattr(steps, "QUICK", ("small",))


def rounds_of(network: str, task: str, allocator: str, times: list[tuple[float, float, float]]) -> list[records.Row]:
    """Return rows in which elapsed and CPU time are the same."""
    where = {"network": network, "task": task, "layout": "contiguous", "precision": "float32", "allocator": allocator}
    where |= {"batch": 2, "size": 8, "layers": 3, "fused": 2}
    kinds = itertools.product(steps.CONTENDERS, (steps.ELAPSED, steps.CPU))
    places = [(f"{name}_{kind}", steps.CONTENDERS.index(name)) for name, kind in kinds]
    return [{k: str(v) for k, v in where.items()} | {n: str(row[i]) for n, i in places} for row in times]


@pytest.mark.usefixtures("small")
def test_a_cell_is_measured_once_and_reported(tmp_path):
    first = measured(tmp_path, only="training step, contiguous, float32")
    assert len({tuple(r[k] for k in steps.KEY) for r in first}) == 1
    assert [(r["allocator"], r["round"]) for r in first] == [(a, i) for a in ("default", "kept") for i in "01"]
    assert measured(tmp_path, only="training step, contiguous, float32") == first
    rows = measured(tmp_path)
    assert len({tuple(r[k] for k in steps.KEY) for r in rows}) == 8
    assert {r["allocator"] for r in rows if r["task"] == steps.INFERENCE} == {"kept"}
    assert {(r["layers"], r["fused"], r["batch"]) for r in rows} == {("1", "1", "2")}
    texts = steps_report.texts(rows)
    assert list(texts) == ["networks-training", "networks-inference", "networks-memory", "networks-summary"]
    assert "| small, 2×3×64×64 (1 of 1) | channels-last | bfloat16 autocast |" in texts["networks-inference"]


def test_speedup_is_the_median_within_rounds():
    rows = rounds_of("n", steps.TRAINING, "kept", [(2 * i, i, i / 2) for i in range(1, 10)] + [(1, 9, 1)])
    assert steps.speedup(rows, steps.CPU) == (2.0, 2.0, 2.0)


def test_shares_come_from_the_differences_to_no_normalization():
    rows = rounds_of("n", steps.TRAINING, "kept", [(20 + i, 12 + i, 10 + i) for i in range(10)])
    assert steps.share_of_gain(rows, steps.CPU) == pytest.approx((0.8, 0.8, 0.8))
    rows = rounds_of("n", steps.TRAINING, "kept", [(20, 16, 12)] * 5)
    assert steps.share_of_norm(rows, steps.CPU) == (0.4, 0.25)


def test_no_share_is_reported_where_nothing_is_to_gain():
    rows = rounds_of("n", steps.TRAINING, "kept", [(10, 9, 9), (10, 9, 12), (10, 9, 8), (10, 9, 11)])
    assert steps.share_of_gain(rows, steps.CPU) is None
    assert steps_report.texts(rows)["networks-training"].endswith(" |  | 4 |\n")


def test_the_summary_names_each_way_to_be_faster():
    rows = rounds_of("n", steps.TRAINING, "default", [(40, 20, 10)] * 3)
    rows += rounds_of("n", steps.TRAINING, "kept", [(20, 8, 5)] * 3)
    texts = steps_report.texts(rows)
    assert "| n | 2.00× (2.00 to 2.00) | 2.00× (2.00 to 2.00) | 5.00× (5.00 to 5.00) |" in texts["networks-summary"]
    assert "| n | contiguous | float32 | 2.00× (2.00 to 2.00) |" in texts["networks-memory"]


def test_memory_is_compared_within_rounds():
    before = rounds_of("n", steps.TRAINING, "default", [(2 * i, i, i) for i in range(1, 10)])
    after = rounds_of("n", steps.TRAINING, "kept", [(i, i / 2, i) for i in range(1, 10)])
    assert steps.speedup_between(before, after, steps.ACCELERATED, steps.CPU) == (4.0, 4.0, 4.0)


def test_each_setting_is_made_before_its_times():
    calls: list[str] = []
    contenders = {name: functools.partial(calls.append, name) for name in ("torch", "none")}
    settings = {name: functools.partial(calls.append, name) for name in ("default", "kept")}
    times = timing.in_rounds(contenders, settings, seconds=0, least=4)
    assert {name: len(rounds) for name, rounds in times.items()} == {"default": 4, "kept": 4}
    turns = [tuple(calls[i : i + 4]) for i in range(2, len(calls), 4)]
    assert {(setting, first) for setting, first, *_ in turns} == {("default", "torch"), ("kept", "torch")}
    assert all(set(timed) == {"torch", "none"} for _, _, *timed in turns)


def test_the_target_is_the_share_of_the_gain():
    rows = rounds_of("ResNet-18", steps.TRAINING, "kept", [(20, 12, 10)] * 3)
    contiguous, last = targets.network_verdicts(rows, "kept")
    assert contiguous.met and contiguous.measured.startswith("80% (95 % interval 80% to 80%")
    assert last.met is None


def test_networks_that_differ_are_not_measured():
    model, other = Small().double(), Small().double()
    with pytest.raises(RuntimeError, match="must have the same gradients in float64; they differ by"):
        steps.check_gradients(model, other, torch.randn(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ResNet-18", 11_689_512),
        ("ResNet-50", 25_557_032),
        ("MobileNetV2", 3_504_872),
        ("DenseNet-121", 7_978_856),
        ("EfficientNet-B0", 5_288_548),
    ],
)
def test_networks_have_the_published_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = networks.NETWORKS[name]()
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.eval()(torch.empty(1, 3, 64, 64)).shape == (1, 1000)


def test_networks_without_normalization_keep_everything_else():
    model = networks.UNet(width=2, levels=2)
    plain = networks.without_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert sum(isinstance(m, nn.Conv2d) for m in plain.modules()) == sum(
        isinstance(m, nn.Conv2d) for m in model.modules()
    )
    assert plain(torch.randn(1, 3, 8, 8)).shape == (1, 2, 8, 8)
