"""Ten mistakes that users make with batch normalization, and five networks to plant them into."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.compare.inputs import data as datasets
from tests.doctor.real_weights import digits_of, mobilenet

Batches = list[tuple[Tensor, Tensor]]
TRAINING, EVALUATION = range(4000), range(4000, 4512)
SIZE = 64


# The networks --------------------------------------------------------------------------------------------------------


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """A body of blocks, a mean over positions, and a linear head."""

    def __init__(self, body: nn.Sequential, features: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, 10)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pool is None else pool

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.inner = nn.Sequential(_block(channels, channels), convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def _convolutional() -> nn.Module:
    return Classifier(nn.Sequential(_block(1, 8), _block(8, 16, 2), _block(16, 16), _block(16, 32)), 32)


def _residual() -> nn.Module:
    return Classifier(nn.Sequential(_block(1, 12), Residual(12), _block(12, 24, 2), Residual(24)), 24)


def _perceptron() -> nn.Module:
    def layer(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())

    return Classifier(
        nn.Sequential(nn.Sequential(nn.Flatten(), *layer(64, 48)), layer(48, 48), layer(48, 32)), 32, nn.Identity()
    )


def _mobilenet() -> nn.Module:
    """The first seven blocks of MobileNetV2 with their published weights, 18 layers, and a head fitted to digits."""
    model = Classifier(mobilenet().features[:7], 32)
    data = random_batches("mobilenet", 16)
    model.body = batchnorm.recalibrate(model.body, data).model
    with torch.no_grad():
        features = torch.cat([model.eval().pool(model.body(x)) for x, _ in data])
    labels = torch.cat([y for _, y in data])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model.head(features), labels)
        value.backward()
        return value

    optimizer.step(loss)
    return model


@dataclass(frozen=True)
class Kind:
    """How a network is made, the size and channels of its images, and the steps and rate of its training."""

    make: Callable[[], nn.Module]
    size: int
    channels: int
    steps: int
    rate: float


KINDS = {
    "convolutional": Kind(_convolutional, 8, 1, 80, 0.1),
    "residual": Kind(_residual, 8, 1, 80, 0.1),
    "perceptron": Kind(_perceptron, 8, 1, 80, 0.1),
    "usps": Kind(lambda: digits_of("usps"), 16, 1, 20, 0.01),
    "mobilenet": Kind(_mobilenet, 32, 3, 12, 0.002),
}


@functools.cache
def images(name: str) -> tuple[Tensor, Tensor]:
    """Return handwritten digits of the network's size, from 0 to 1, and their labels."""
    kind, held = KINDS[name], datasets.load("mnist-mini")
    x = held.x_train[: EVALUATION.stop]
    x = F.interpolate((x - x.min()) / (x.max() - x.min()), (kind.size, kind.size), mode="bilinear", antialias=True)
    return x.expand(-1, kind.channels, -1, -1), held.y_train[: EVALUATION.stop]


def batches(name: str, rows: Iterable[int] = EVALUATION) -> Batches:
    x, y = (part[torch.tensor(list(rows))] for part in images(name))
    return list(zip(x.split(SIZE), y.split(SIZE), strict=True))


def random_batches(name: str, steps: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return batches(name, torch.randint(len(TRAINING), (steps * SIZE,), generator=generator).tolist())


def train(model: nn.Module, data: Batches, rate: float) -> torch.optim.Optimizer:
    """Train for a step on each batch, with a learning rate that falls to zero."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(data))
    model.train()
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return optimizer


@functools.cache
def _trained(name: str) -> nn.Module:
    kind = KINDS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.make()
        train(model, random_batches(name, kind.steps), kind.rate)
    return batchnorm.recalibrate(model, batches(name)).model


def trained(name: str) -> nn.Module:
    """Return a fresh copy in training mode."""
    return copy.deepcopy(_trained(name)).train()


def norms(model: nn.Module) -> list[nn.Module]:
    return [found.module for found in batchnorm.walk.norm_layers(model)]


# The mistakes --------------------------------------------------------------------------------------------------------


@dataclass
class Mistake:
    """A network with a planted mistake, and what the user has at hand.

    Attributes:
        model: The network.
        data: The batches that are diagnosed, which the fix calls `training_data` and `data`.
        options: Arguments of `diagnose`.
        evaluate: How the user evaluates: `evaluate(model, x)` returns the output for a batch.
    """

    model: nn.Module
    data: Batches
    options: dict[str, Any] = field(default_factory=dict)


def small_momentum(name: str) -> Mistake:
    """Train for 189 steps with a momentum of 0.001.

    The running statistics are those that 189 steps leave if the activations do not change: a network that hardly learns
    any more.
    """
    model = trained(name)
    for layer in norms(model):
        layer.reset_running_stats()
        layer.momentum = 1.0
        layer.num_batches_tracked += 188
    x = torch.cat([x for x, _ in random_batches(name, 4)])
    left = (1 - 0.001) ** 189
    with torch.no_grad():
        model(x)
        for layer in norms(model):
            layer.momentum = 0.001
            layer.running_mean *= 1 - left
            layer.running_var.mul_(1 - left).add_(left)
    return Mistake(model, batches(name))


def evaluated_in_training(name: str) -> Mistake:
    """Forget `model.eval()` in the evaluation."""
    model, data = trained(name), batches(name)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> float:
        return sum(float((model(x).argmax(1) == y).double().mean()) for x, y in data) / len(data)

    return Mistake(model, data, {"evaluate": evaluate})


def _in_turn(data: Batches) -> Batches:
    return [(1 - x if number % 2 else x, y) for number, (x, y) in enumerate(data)]


def two_domains(name: str) -> Mistake:
    """Train on dark and on bright digits, in turn."""
    model = trained(name)
    train(model, _in_turn(random_batches(name, KINDS[name].steps // 2, 1)), KINDS[name].rate / 2)
    return Mistake(model, _in_turn(batches(name)))


class Checkpointed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x, use_reentrant=False)


def checkpointed(name: str) -> Mistake:
    """Run the network in a checkpoint, which runs it again in the backward pass."""
    return Mistake(Checkpointed(trained(name)), batches(name))


def averaged(name: str) -> Mistake:
    """Average the weights of a training whose rate is too large to settle, and evaluate with the last statistics."""
    model = trained(name)
    average = AveragedModel(model)
    average.update_parameters(model)
    for seed in (1, 2):
        train(model, random_batches(name, 12, seed), 5 * KINDS[name].rate)
        average.update_parameters(model)
    return Mistake(average.train(), batches(name))


def half_frozen(name: str) -> Mistake:
    """Freeze all but the head by `requires_grad`, and train the head on digits of little contrast."""
    model = trained(name)
    (model.body if isinstance(model, Classifier) else model.features).requires_grad_(False)
    train(model, [(0.5 + 0.4 * x, y) for x, y in random_batches(name, 8, 1)], KINDS[name].rate / 2)
    return Mistake(model, [(0.5 + 0.4 * x, y) for x, y in batches(name)])


def sorted_by_class(name: str) -> Mistake:
    """Forget to shuffle data that are sorted by class."""
    model = trained(name)

    def in_order(data: Batches) -> Batches:
        x, y = (torch.cat(part) for part in zip(*data, strict=True))
        order = y.argsort(stable=True)
        return list(zip(x[order].split(SIZE), y[order].split(SIZE), strict=True))

    train(model, in_order(random_batches(name, KINDS[name].steps // 2, 1)), KINDS[name].rate / 10)
    return Mistake(model, in_order(batches(name)))


def dropout_before(name: str) -> Mistake:
    """Put dropout before the layers, and train on."""
    model = trained(name)
    for found in batchnorm.walk.norm_layers(model)[1:4]:
        batchnorm.walk.replace(model, found, nn.Sequential(nn.Dropout(0.6), found.module))
    train(model, random_batches(name, 20, 1), KINDS[name].rate / 5)
    return Mistake(model, batches(name))


def other_scale(name: str) -> Mistake:
    """Evaluate on images from 0 to 255, after a training on images from 0 to 1."""
    return Mistake(trained(name), [(255 * x, y) for x, y in batches(name)])


def without_buffers(name: str) -> Mistake:
    """Save the parameters and not the buffers, and load them into a new network."""
    model = trained(name)
    for layer in norms(model):
        layer.reset_running_stats()
    return Mistake(model, batches(name))


MISTAKES: dict[str, tuple[Callable[[str], Mistake], str]] = {
    "momentum of 0.001 over 189 steps": (small_momentum, "BN217"),
    "evaluation in training mode": (evaluated_in_training, "BN208"),
    "two domains in turn": (two_domains, "BN115"),
    "checkpointed": (checkpointed, "BN106"),
    "averaged weights": (averaged, "BN116"),
    "frozen weights, live statistics": (half_frozen, "BN107"),
    "data sorted by class": (sorted_by_class, "BN105"),
    "dropout before": (dropout_before, "BN111"),
    "another scale in evaluation": (other_scale, "BN103"),
    "checkpoint without buffers": (without_buffers, "BN201"),
}
