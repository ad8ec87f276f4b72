"""For every rule a healthy network of realistic depth with a planted defect, and the same network without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from batchnorm.doctor import Severity
from tests.doctor.case import Case, norms
from tests.doctor.defective import AlwaysTraining, Checkpointed, OnlyNamed, Recurrent, Sequences, Table, WithActivation
from tests.doctor.networks import Plain, batches, criterion, digits, train, trained

# Planted ----------------------------------------------------------------------------------------------------------


def averaged() -> Case:
    """Average the weights with later ones, and leave the statistics unchanged."""
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


def checkpointed() -> Case:
    return Case(Checkpointed(trained("plain")), batches(6, 16), {"loss": criterion}, Severity.NOTE)


def frozen_backbone() -> Case:
    model = trained("plain")
    model.blocks.requires_grad_(False)
    return Case(model, batches(), {"loss": criterion}, Severity.WARNING)


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


def hidden_activation() -> Case:
    model = trained("plain")
    for block in model.blocks:
        block[1].__class__ = WithActivation
    return Case(model, None)


def only_named() -> Case:
    model = trained("plain")
    model.blocks[0][1].__class__ = type("OnlyNamed", (nn.BatchNorm2d,), {})
    replaced = OnlyNamed(model.blocks[1][1].num_features)
    replaced.load_state_dict(model.blocks[1][1].state_dict())
    model.blocks[1][1] = replaced
    return Case(model, None)


def moving() -> Case:
    model = trained("plain")
    norms(model)[2].__class__ = AlwaysTraining
    return Case(model, batches(), {"loss": criterion}, Severity.WARNING)


def empty_filters() -> Case:
    model = trained("plain")
    with torch.no_grad():
        model.blocks[3][0].weight[5:8] = 0
    return Case(model, batches(), {"loss": criterion})


def exposures(spread: float) -> Case:
    """Classify which pictures are brighter than the others of their batch; each batch has its own exposure."""
    x, _ = digits()
    generator = torch.Generator().manual_seed(0)

    def batch(first: int, last: int) -> tuple[Tensor, Tensor]:
        given = x[torch.randint(first, last, (64,), generator=generator)]
        brightness = given[:, 0].mean((1, 2))
        return given + spread * torch.randn((), generator=generator), (brightness > 0.13).long()

    torch.manual_seed(0)
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(80):
        given, labels = batch(0, 5000)
        optimizer.zero_grad()
        criterion(model(given), labels).backward()
        optimizer.step()
    return Case(model, [batch(5000, len(x)) for _ in range(12)], {"loss": criterion}, Severity.ERROR)


def sequences(padded: bool) -> Case:
    """Sequences of digit rows, of different lengths if padded."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for x, y in batches():
        rows = (x + 0.01 * torch.rand(x.shape, generator=generator)).flatten(1, 2).repeat(1, 1, 3)
        ends = torch.randint(6, 42, (len(x), 1, 1), generator=generator)
        data.append((torch.where(torch.arange(42) < ends, rows, 0.0) if padded else rows, y))
    torch.manual_seed(0)
    model = Sequences()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(8):
        for x, y in data:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
    return Case(model, data, {"loss": criterion}, Severity.WARNING)


def overflowing(scale: float) -> Case:
    """Weights in float16 that grew unnoticed, because the normalization removes any scale."""
    model = trained("plain")
    with torch.no_grad():
        model.blocks[2][0].weight *= scale
        for x, _ in batches():
            model(x)
    data = [(x.half(), y) for x, y in batches()]
    return Case(model.half(), data, {"loss": lambda y, t: criterion(y.float(), t)}, Severity.ERROR)


def deployed() -> Case:
    return Case(trained("plain").eval().requires_grad_(False), None)


@contextmanager
def four_processes() -> Iterator[None]:
    """Be the first process of a fake group of four, in which nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def one_of_four() -> Case:
    return replace(batches_of_two(), around=four_processes)


def apart() -> Case:
    """Be the first of two processes; the other one trained on other data, and buffers are not broadcast."""
    options: dict[str, Any] = {}

    def gather(every: list[Any], own: tuple[str, Any], group: Any = None) -> None:
        kind, states = own
        if states is not None:
            states = {path: {**of, "running_mean": of["running_mean"] + 2} for path, of in states.items()}
        every[:] = [own, (kind, states)]

    @contextmanager
    def two_processes() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_gather_object", gather)
            dist.init_process_group("fake", rank=0, world_size=2, store=dist.HashStore())
            options["process_group"] = dist.group.WORLD
            try:
                yield
            finally:
                dist.destroy_process_group()

    return Case(trained("plain"), None, options, Severity.WARNING, two_processes)


def two_domains() -> Case:
    """Train on dark and on bright pictures in turn, and diagnose such batches."""
    model = trained("plain")
    x, y = digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for step in range(20):
        rows = slice(64 * step, 64 * (step + 1))
        optimizer.zero_grad()
        criterion(model(1 - x[rows] if step % 2 else x[rows]), y[rows]).backward()
        optimizer.step()
    data = [(1 - x if number % 2 else x, y) for number, (x, y) in enumerate(batches())]
    return Case(model, data, {"loss": criterion}, Severity.ERROR)


def averaged_model() -> Case:
    """Average the weights of a training, and keep the last statistics."""
    model = trained("plain")
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    train(model, 60, lr=0.1, seed=3)
    average.update_parameters(model)
    return Case(average.train(), batches(), {"loss": criterion}, Severity.ERROR)


def small_momentum() -> Case:
    model = trained("plain")
    for layer in norms(model):
        layer.reset_running_stats()
        layer.momentum = 0.01
    x, _ = batches(1)[0]
    for _ in range(20):
        model(x)
    return Case(model, batches(), {"loss": criterion}, Severity.ERROR)


def tracking_off() -> Case:
    """Fine-tune like callbacks that freeze γ and β and switch tracking off; the layers train by the batch."""
    model = trained("plain")
    for layer in norms(model):
        layer.requires_grad_(False).track_running_stats = False
    train(model, 60, lr=0.1, seed=3)
    return Case(model, batches(), {"loss": criterion}, Severity.ERROR)


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
    "BN112": lambda: exposures(1.0),
    "BN113": lambda: sequences(padded=True),
    "BN114": lambda: overflowing(1e5),
    "BN115": two_domains,
    "BN116": averaged_model,
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
    "BN213": deployed,
    "BN214": one_of_four,
    "BN215": apart,
    "BN216": tracking_off,
    "BN217": small_momentum,
}
# Rules whose healthy case is not simply a trained network on data like its training data.
HEALTHY: dict[str, Callable[[], Case]] = {
    "BN108": lambda: table(0.0),
    "BN109": lambda: recurrent(apart=True),
    "BN111": lambda: with_dropout(slice(5, 6)),
    "BN112": lambda: exposures(0.0),
    "BN113": lambda: sequences(padded=False),
    "BN114": lambda: overflowing(1.0),
    "BN203": lambda: decayed(0.0),
    "BN212": only_named,
}
# Further errors that a defect causes.
RELATED = {
    "BN101": {"BN102"},
    "BN102": {"BN101"},
    "BN103": {"BN101"},
    "BN105": {"BN101"},
    "BN109": {"BN101", "BN102"},
    "BN111": {"BN101"},
    "BN112": {"BN101", "BN105"},
    "BN114": {"BN202"},
    "BN115": {"BN101", "BN102", "BN112"},
    "BN116": {"BN101"},
    "BN201": {"BN101", "BN102"},
    "BN210": {"BN101", "BN102"},
    "BN214": {"BN104"},
    "BN216": {"BN101", "BN102"},
    "BN217": {"BN101"},
}
