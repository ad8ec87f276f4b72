"""The files that the benchmark of folding writes, on networks of its own. No test depends on measured time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.measuring import records
from benchmarks.measuring.options import Options
from benchmarks.reports import report
from benchmarks.sections import fold
from benchmarks.subjects import zoo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    network = zoo.Network(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 6, 6))
    monkeypatch.setattr(zoo, "found", lambda **_: {"small": network})


def test_a_network_is_one_row_and_is_not_folded_again(small, tmp_path) -> None:
    options = Options(tmp_path, quick=True, seconds=0.001, threads=1, only="", allocator="default")
    table = records.Table(tmp_path / "fold.csv", fold.KEY)
    for _ in range(2):
        fold.measure_fold(options, table)
    (row,) = table.rows()
    assert (row["batch_norms"], row["remaining"], row["fused"], row["fx_remaining"]) == ("1", "0", "0", "0")
    assert row["within_target"] == "True"
    assert float(row["error"]) < 1e-6
    text = report.fold_markdown([row])
    assert text.startswith("1 networks: in 1, the error is at most")
    assert "| small | fx | 1 | 0 | 0 |" in text


def test_what_torch_fx_cannot_trace_is_named() -> None:
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    x = torch.randn(2, 3)
    assert fold._by_fx(Decides(), x, x)["fx_failure"] == "TraceError"


def test_networks_of_our_own_are_always_there() -> None:
    found = zoo.found(quick=True)
    assert {"ResNet18", "MobileNetV2"} <= set(found)
    assert list(zoo.found(only="MobileNetV2")) == ["MobileNetV2"]


def test_every_contender_gives_the_networks_result() -> None:
    model = zoo.randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 6, 6)
    for call in fold._contenders(model, x, slow=False).values():
        assert torch.allclose(call(), model(x), atol=1e-5)
