"""The training of one network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.compare import Data
from batchnorm.compare.inputs import norms
from batchnorm.compare.inputs.learning_rate import LearningRate
from batchnorm.compare.inputs.networks import mlp
from batchnorm.compare.inputs.sampling import IID
from batchnorm.compare.records import Evaluation, Histogram, Step
from batchnorm.compare.training.loop import LoopOptions, train
from batchnorm.compare.training.measurements import Activations
from batchnorm.compare.training.parallel import Processes


class Records:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.run = SimpleNamespace(seed=0)
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.histograms: list[Histogram] = []
        self.diverged_at: int | None = None

    def add(self, record: Step | Evaluation | Histogram) -> None:
        getattr(self, f"{type(record).__name__.lower()}s").append(record)

    def end(self, layers: list[Any], diverged_at: int | None) -> None:
        self.diverged_at = diverged_at


def trained(data: Data, spec: str = "batch", lr: float = 0.1, **given: Any) -> tuple[nn.Module, Records]:
    torch.manual_seed(0)
    norm, records = norms.parse(spec), Records()
    network = mlp(norm, data.in_shape, data.num_classes)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    options = LoopOptions(**{"steps": 7, "batch_size": 16, "evaluate_every": 3, **given})
    watched = Activations(network, norm, data.x_train[:8])
    train(network, norm, data, optimizer, options, watched, records, lambda *_: None, Processes())  # type: ignore[arg-type]
    return network, records


def by_hand(data: Data, rates: list[float]) -> tuple[nn.Module, list[float]]:
    """The same training, written out; returns the network and the norm of each gradient."""
    torch.manual_seed(0)
    network = mlp(norms.parse("batch"), data.in_shape, data.num_classes)
    batches, found = IID.batches(data.y_train, 16, 0), []
    for rate in rates:
        index = next(batches)
        loss = F.cross_entropy(network(data.x_train[index]), data.y_train[index])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return network, found


def test_the_norm_of_the_gradient_is_recorded_where_the_network_is_looked_at(data: Data) -> None:
    _, records = trained(data)
    _, expected = by_hand(data, [0.1] * 7)
    recorded = {record.step: record.gradient_norm for record in records.steps}
    assert [step for step, value in recorded.items() if value is not None] == [1, 3, 6, 7]
    for step in (1, 3, 6, 7):
        assert recorded[step] == pytest.approx(expected[step - 1], rel=1e-4)


def test_the_learning_rate_follows_its_schedule(data: Data) -> None:
    network, _ = trained(data, lr=0.4, steps=4, learning_rate=LearningRate.parse("linear:warmup=2"))
    expected, _ = by_hand(data, [0.2, 0.4, 0.4, 0.2])
    for (name, value), (_, other) in zip(network.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(value, other, msg=name)


def test_both_ends_of_the_network_are_watched(data: Data) -> None:
    _, records = trained(data)
    assert [(h.step, h.where) for h in records.histograms] == [
        (step, where) for step in (1, 3, 6, 7) for where in ("first", "last")
    ]


def test_both_data_sets_are_looked_at(data: Data) -> None:
    _, records = trained(data)
    assert [record.step for record in records.evaluations] == [0, 3, 6, 7]
    assert all(record.train_accuracy is not None and record.train_loss is not None for record in records.evaluations)


def test_a_loss_that_is_not_finite_ends_it(data: Data) -> None:
    _, records = trained(data, "none", lr=1e30)
    assert records.diverged_at == len(records.steps) < 7
    assert records.steps[-1].loss is None
    assert records.evaluations[-1].step == records.diverged_at
