"""What the benchmark of accelerated networks writes, on a network of its own; none of these looks at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import accelerate, records, report, steps, zoo
from benchmarks.options import Options


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_an_alternation_is_one_row_and_is_not_measured_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zoo, "timed", lambda *_: {"small": Small})
    options = Options(tmp_path, quick=True, seconds=0.001, rounds=2, threads=1, only="", allocator="kept")
    table = records.Table(tmp_path / "accelerate.csv", accelerate.KEY)
    for _ in range(2):
        accelerate.measure_accelerate(options, table)
    rows = table.rows()
    assert [(r["layout"], r["round"]) for r in rows] == [
        (layout, i) for layout in ("contiguous", "channels-last") for i in "01"
    ]
    assert {(r["changed"], r["fused"]) for r in rows} == {("1", "1")}
    assert "| small, 4×3×64×64 | 1, 1 | contiguous |" in report.accelerate_markdown(rows)


def test_the_ratio_is_the_median_of_those_within_a_round() -> None:
    rows = [{"torch_ms": 2 * i, "accelerated_ms": i} for i in range(1, 10)] + [{"torch_ms": 1, "accelerated_ms": 9}]
    assert accelerate.times_as_fast(rows) == (2.0, 2.0, 2.0)


def test_networks_that_differ_are_not_measured() -> None:
    model, other = Small().double(), Small().double()
    with pytest.raises(RuntimeError, match="must have the same gradients in float64; they differ by"):
        steps.check_gradients(model, other)
