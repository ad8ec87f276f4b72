"""`watch`: which steps it looks at, and how much time it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.doctor import Watch, watch
from batchnorm.doctor.watching import watcher
from batchnorm.doctor.watching.pace import AFTERMATH, Pace
from tests.doctor.networks import criterion, digits, trained
from tests.doctor.watching.training import train


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
    """A clock that only the test advances."""

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
    assert len(looked) - 1 <= 1.01 * affordable  # the first does not count
    assert len(looked) >= 0.9 * min(affordable, 5000)


def test_a_pause_buys_no_burst() -> None:
    clock = Clock()
    looked = paced(Pace(0.02, clock=clock), clock, 1000, lambda step: 100.0 if step == 500 else 0.1, 0.02)
    assert sum(501 <= step <= 510 for step in looked) == 2  # the time saved until then allows two
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
