"""The layers of two processes, compared by both."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchnorm.doctor import Severity, diagnose
from batchnorm.doctor.measure.processes import ProcessStates
from tests.processes import spawn


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        model = network()
        alike = diagnose(model, process_group=dist.group.WORLD)
        assert not [finding for finding in alike.findings if finding.code == "BN215"]

        model[1].running_mean += 0.1 * rank
        model[4].running_var *= 1 + rank
        (found,) = [f for f in diagnose(model, process_group=dist.group.WORLD).findings if f.code == "BN215"]
        assert found.paths == ("4", "1") and found.severity == Severity.WARNING

        with torch.no_grad():
            model[1].weight += rank
        worst = diagnose(model, process_group=dist.group.WORLD).findings[0]
        assert worst.code == "BN215" and worst.severity == Severity.ERROR and worst.paths == ("1",)

        (alone,) = [rule for rule in diagnose(model).not_checked if rule.code == "BN215"]
        assert "process_group=" in alone.reason
        other = nn.Sequential(nn.BatchNorm2d(3 + rank))
        (found,) = [f for f in diagnose(other, process_group=dist.group.WORLD).findings if f.code == "BN215"]
        assert found.severity == Severity.ERROR and "channels" in found.summary
        torch.save(True, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="the processes speak over gloo")
def test_two_processes_are_compared(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),))
    assert (tmp_path / "rank0.pt").exists() and (tmp_path / "rank1.pt").exists()


def test_the_distance_of_statistics_is_in_deviations() -> None:
    one = {"a": {"running_mean": np.zeros(3), "running_var": np.full(3, 4.0)}}
    other = {"a": {"running_mean": np.ones(3), "running_var": np.full(3, 4.0)}}
    assert ProcessStates((one, other)).difference("a", 0.0) == (0.0, 0.5)
    other["a"]["running_mean"][1] = np.nan
    assert ProcessStates((one, other)).difference("a", 0.0) == (0.0, float("inf"))
