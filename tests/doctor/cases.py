"""For every rule a defect planted into a healthy network of realistic depth, and the same network without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.doctor import Severity
from tests.doctor.networks import Plain, batches, criterion, train, trained

Batches = list[tuple[Tensor, Tensor]] | None


@dataclass(frozen=True)
class Case:
    """What to diagnose, and the severity that a planted defect has there."""

    model: nn.Module
    data: Batches
    options: dict[str, Any] = field(default_factory=dict)
    severity: Severity = Severity.NOTE


def healthy() -> Case:
    return Case(trained("plain"), batches(), {"loss": criterion})


def norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


# Planted ----------------------------------------------------------------------------------------------------------


def averaged() -> Case:
    """Weights averaged with those of later training, and the statistics left as they were."""
    model, later = trained("plain"), trained("plain")
    train(later, 60, lr=0.1, seed=3)
    with torch.no_grad():
        for p, q in zip(model.parameters(), later.parameters(), strict=True):
            p.lerp_(q, 0.5)
    return Case(model, batches(), {"loss": criterion}, Severity.ERROR)


def other_data() -> Case:
    """Pictures prepared with mean 0.5 and deviation 0.25 for a network that was trained on 0 to 1."""
    return Case(trained("plain"), [((x - 0.5) / 0.25, y) for x, y in batches()], {"loss": criterion}, Severity.ERROR)


def batches_of_two() -> Case:
    return Case(trained("plain"), batches(64, 2), {"loss": criterion}, Severity.ERROR)


def sorted_batches() -> Case:
    x, y = (torch.cat(part) for part in zip(*batches(), strict=True))
    order = y.argsort()
    data = list(zip(x[order].split(64), y[order].split(64), strict=True))
    return Case(trained("plain"), data, {"loss": criterion}, Severity.ERROR)


class Checkpointed(nn.Module):
    def __init__(self, network: Plain) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        for block in self.network.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.network.head(x.mean((2, 3)))


def checkpointed() -> Case:
    return Case(Checkpointed(trained("plain")), batches(6, 16), {"loss": criterion}, Severity.NOTE)


def frozen_backbone() -> Case:
    model = trained("plain")
    model.blocks.requires_grad_(False)
    return Case(model, batches(), {"loss": criterion}, Severity.WARNING)


class Table(nn.Module):
    """A network for tables, which normalizes its columns first."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.BatchNorm1d(8)
        self.hidden = nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.columns(x))


def table(start: float, severity: Severity = Severity.NOTE) -> Case:
    """Rows of an hour, one of whose columns is the time in seconds after `start`."""
    generator = torch.Generator().manual_seed(0)
    model = Table()
    rows = torch.randn(1024, 8, generator=generator, dtype=torch.float64)
    rows[:, 3] = start + 1000 * rows[:, 3]
    data = [(part, part[:, :1] * 0) for part in rows.float().split(128)]
    model.columns.momentum = model.hidden[1].momentum = None
    for x, _ in data:
        model(x)
    return Case(model, data, {"loss": nn.functional.mse_loss}, severity)


class Recurrent(nn.Module):
    """A cell whose batch normalization all steps share, and whose state grows from step to step."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, 2, 1, bias=False)
        self.cell = nn.Conv2d(24, 24, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(24) for _ in range(4))
        self.apart = apart
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = given = self.first(x)
        for step in range(4):
            norm = self.norms[step if self.apart else 0]
            state = state + 2 * step * given + torch.relu(norm(self.cell(state)))
        return self.head(state.mean((2, 3)))


def recurrent(apart: bool) -> Case:
    torch.manual_seed(0)
    model = Recurrent(apart)
    if not apart:
        del model.norms[1:]
    train(model, 60, lr=0.01)
    return Case(model, batches(), {"loss": criterion}, Severity.WARNING)


def with_bias() -> Case:
    model = trained("plain")
    for block in list(model.blocks)[:3]:
        block[0].bias = nn.Parameter(torch.zeros(block[0].out_channels))
    return Case(model, None, {}, Severity.NOTE)


def without_buffers() -> Case:
    """A checkpoint from which the buffers were left out."""
    model = trained("plain")
    for layer in norms(model):
        layer.reset_running_stats()
    return Case(model, batches(), {"loss": criterion}, Severity.ERROR)


def poisoned() -> Case:
    """One bad batch in training."""
    model = trained("plain")
    x, _ = batches(1, 16)[0]
    x = x.clone()
    x[3, 1, 5, 5] = torch.inf
    model(x)
    return Case(model, None, {}, Severity.ERROR)


def decayed(weight_decay: float) -> Case:
    model = trained("plain")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    return Case(model, None, {"optimizer": optimizer})


def keras_momentum() -> Case:
    model = trained("plain")
    for layer in norms(model):
        layer.momentum = 0.99
    return Case(model, batches(12, 16), {"loss": criterion}, Severity.WARNING)


def other_epsilon() -> Case:
    model = trained("plain")
    norms(model)[2].eps = 1e-3
    return Case(model, None)


def dead() -> Case:
    model = trained("plain")
    with torch.no_grad():
        norms(model)[3].weight[::2] = 1e-7
    return Case(model, None)


def in_bfloat16() -> Case:
    model = trained("plain")
    with torch.no_grad():
        norms(model)[1].running_mean += 4 * norms(model)[1].running_var.sqrt()
    return Case(model.to(torch.bfloat16), None, {}, Severity.WARNING)


def untracked() -> Case:
    model = trained("plain")
    for layer in norms(model):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return Case(model, None)


def with_dropout(where: slice) -> Case:
    """A network trained with dropout behind some of its blocks."""
    torch.manual_seed(0)
    model = Plain()
    for block in list(model.blocks)[where]:
        block.append(nn.Dropout(0.5))
    train(model, 60, lr=0.05)
    return Case(model, batches(), {"loss": criterion}, Severity.NOTE)


def exploded() -> Case:
    model = trained("plain")
    with torch.no_grad():
        norms(model)[1].running_var[3] = 0
        norms(model)[1].weight[3] = 30
    return Case(model, None)


class WithActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def hidden_activation() -> Case:
    model = trained("plain")
    for block in model.blocks:
        block[1].__class__ = WithActivation
    return Case(model, None)


class AlwaysTraining(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps
        )


def moving() -> Case:
    model = trained("plain")
    norms(model)[2].__class__ = AlwaysTraining
    return Case(model, batches(), {"loss": criterion}, Severity.WARNING)


def empty_filters() -> Case:
    model = trained("plain")
    with torch.no_grad():
        model.blocks[3][0].weight[5:8] = 0
    return Case(model, batches(), {"loss": criterion})


PLANTED: dict[str, Callable[[], Case]] = {
    "BN101": averaged,
    "BN102": averaged,
    "BN103": other_data,
    "BN104": batches_of_two,
    "BN105": sorted_batches,
    "BN106": checkpointed,
    "BN107": frozen_backbone,
    "BN108": lambda: table(1.7e9, Severity.WARNING),
    "BN109": lambda: recurrent(apart=False),
    "BN110": with_bias,
    "BN111": lambda: with_dropout(slice(0, 5)),
    "BN201": without_buffers,
    "BN202": poisoned,
    "BN203": lambda: decayed(0.05),
    "BN204": keras_momentum,
    "BN205": other_epsilon,
    "BN206": dead,
    "BN207": in_bfloat16,
    "BN208": untracked,
    "BN209": moving,
    "BN210": empty_filters,
    "BN211": exploded,
    "BN212": hidden_activation,
}
# Where the healthy case is another than a trained network on data like those of training.
HEALTHY: dict[str, Callable[[], Case]] = {
    "BN108": lambda: table(0.0),
    "BN109": lambda: recurrent(apart=True),
    "BN111": lambda: with_dropout(slice(5, 6)),
    "BN203": lambda: decayed(0.0),
}
# Findings that a defect brings with it.
RELATED = {
    "BN101": {"BN102"},
    "BN102": {"BN101"},
    "BN103": {"BN101"},
    "BN105": {"BN101"},
    "BN109": {"BN101", "BN102"},
    "BN111": {"BN101"},
    "BN201": {"BN101", "BN102"},
    "BN210": {"BN101", "BN102"},
}
