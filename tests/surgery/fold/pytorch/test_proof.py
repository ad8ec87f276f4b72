"""The proof of all folds together: its cost, and wrong folds that it must find."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.surgery.fold import branches, fold, search
from batchnorm.surgery.fold.plan import FoldPlan
from tests.surgery.fold.pytorch.patterns import Sum
from tests.surgery.fold.pytorch.test_fold import assert_equal, trained


class Convolutions(TorchDispatchMode):
    """Counts the convolutions by the dtype and shape of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[torch.dtype, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname == "convolution":
            self.counts[args[0].dtype, tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def block(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, 2, 1), nn.BatchNorm2d(out), nn.ReLU()]


def test_a_fold_takes_few_forward_passes() -> None:
    model, x = trained(nn.Sequential(*block(3, 4), *block(4, 4), *block(4, 4))), torch.randn(1, 3, 100, 100)
    with Convolutions() as found:
        _, report = fold(model, x)
    assert report.remaining == 0
    whole = {dtype: found.counts[dtype, tuple(x.shape)] for dtype in (torch.float32, torch.float64)}
    assert whole[torch.float32] <= 5 + 1  # one of them traces
    assert whole[torch.float64] == 1
    large = Counter({key: n for key, n in found.counts.items() if key[1][1] == 3 and key[1][-1] >= 100})
    assert large.total() == sum(whole.values())  # other sizes are small


def plant(monkeypatch: pytest.MonkeyPatch, out_channels: set[int]) -> None:
    """Let every fold backward into a convolution with one of these numbers of channels change its weight."""
    into = FoldPlan.backward.__func__

    def wrong(cls: Any, network: Any, call: Any) -> FoldPlan:
        plan = into(cls, network, call)
        for key, state in plan.states.items():
            if state.weight.shape[0] in out_channels:
                plan.states[key] = type(state)(**{**vars(state), "weight": state.weight * 1.01})
        return plan

    monkeypatch.setattr(FoldPlan, "backward", classmethod(wrong))


def test_several_wrong_folds_are_refused_and_the_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(nn.Sequential(*block(3, 4), *block(4, 5), *block(5, 6), *block(6, 7))), torch.randn(2, 3, 40, 40)
    plant(monkeypatch, {5, 7})
    folded, report = fold(model, x)
    assert [(row.path, row.now.split()[0]) for row in report.changed] == [
        ("1", "in"), ("4", "fused"), ("7", "in"), ("10", "fused"),
    ]  # fmt: skip
    assert all("folding it has an error of" in row.reason for row in report.changed if "fused" in row.now)
    assert_equal(folded, model, x)


def test_a_wrong_fold_is_found_where_every_input_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example, and random inputs, reach no layer after the first activation."""
    model = trained(nn.Sequential(*block(3, 4), *block(4, 5), nn.Conv2d(5, 3, 1)))
    with torch.no_grad():
        model[1].weight.fill_(1e-3)
        model[1].bias.fill_(-10.0)
        assert not model[:3](torch.randn(2, 3, 40, 40)).any()
    plant(monkeypatch, {5})
    _, report = fold(model, torch.randn(2, 3, 40, 40))
    assert [(row.path, row.now) for row in report.changed] == [("1", "in 0"), ("4", "fused with relu")]


def test_a_wrong_merge_is_refused_and_its_branches_stay_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    branch = [nn.Sequential(nn.Conv2d(3, 4, size, padding=size // 2), nn.BatchNorm2d(4)) for size in (3, 1)]
    model, x = trained(Sum(*branch, last=nn.ReLU())), torch.randn(2, 3, 9, 9)

    def misplaced(weight: Tensor, kernel: Any, offset: Any, step: Any) -> Tensor:
        return embedded(weight, kernel, [0] * len(offset), step)

    embedded = branches.embedded
    monkeypatch.setattr(branches, "embedded", misplaced)
    folded, report = fold(model, x)
    assert report.remaining == 0
    assert [row.now for row in report.changed] == ["in branches.0.0", "in branches.1.0"]
    assert_equal(folded, model, x)


def test_a_proof_that_fails_repeats_only_the_folds_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained(nn.Sequential(*block(3, 4), *block(4, 5), *block(5, 6))), torch.randn(2, 3, 40, 40)
    plant(monkeypatch, {5})
    proven: set[Any] = set()
    prove = search.Search._prove

    def counted(self: Any, changed: Any) -> None:
        proven.update(changed)
        prove(self, changed)

    monkeypatch.setattr(search.Search, "_prove", counted)
    fold(model, x)
    assert len(proven) == 1
