"""Trainings to watch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers

from batchnorm.doctor import Watch, watch
from batchnorm.doctor.watching.records import Record
from tests.doctor.networks import criterion, digits

STEPS = 12


def left_behind() -> list[Any]:
    places = [value for name, value in vars(hooks).items() if name.startswith("_global_") and isinstance(value, dict)]
    return [hook for place in (*places, optimizers._global_optimizer_post_hooks) for hook in place.values()]


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
    """Watch a training of this many steps, after a first step without training."""
    with watch(model, every=1, warn=False) as w:
        w.step()
        train(model, steps, **options)
    return w


def last(w: Watch) -> dict[str, Record]:
    return {record.layer: record for record in w.history[-len(w.layers) :]}
