"""Networks trained on digits, which are healthy until a test plants a defect."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.compare.inputs import data
from tests.surgery.networks import DenseNet, MobileNet

SIDE = 14


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Return pictures `[N, 3, 14, 14]` from 0 to 1, and their digits."""
    held = data.load("mnist-mini")
    x = F.avg_pool2d(held.x_train, 2)
    x = (x - x.min()) / (x.max() - x.min())
    return torch.cat([x, 1 - x, x * x], 1), held.y_train


def batches(number: int = 8, size: int = 64, start: int = 5000) -> list[tuple[Tensor, Tensor]]:
    """Return batches that training has not seen, in random order."""
    x, y = digits()
    return [(x[i : i + size], y[i : i + size]) for i in range(start, start + number * size, size)]


class Classifier(nn.Module):
    """A network with a head of ten outputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.network(x)))


def transformers_resnet() -> nn.Module:
    """Return a third-party model with 10 layers of batch normalization."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=16, hidden_sizes=[24, 32, 48], depths=[1, 1, 1], layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    return transformers.ResNetForImageClassification(config)


class Plain(nn.Module):
    """Six convolutions, each with batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = [3, 16, 16, 32, 32, 64, 64], [1, 2, 1, 1, 2, 1]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in zip(widths, widths[1:], strides, strict=False)
            )
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


MAKERS = {
    "plain": Plain,
    "mobilenet": lambda: Classifier(MobileNet()),
    "densenet": lambda: Classifier(DenseNet()),
    "transformers": transformers_resnet,
}


def logits(returned: object) -> Tensor:
    return returned if isinstance(returned, Tensor) else returned.logits


def criterion(returned: object, y: Tensor) -> Tensor:
    return F.cross_entropy(logits(returned), y)


def train(
    model: nn.Module, steps: int, *, lr: float = 0.1, size: int = 64, seed: int = 0, falls: bool = True
) -> torch.optim.Optimizer:
    """Train with a learning rate that falls to zero, so the running statistics catch up, or with a constant one."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1e-3, 1 - step / steps) if falls else 1.0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(5000, (size,), generator=generator)
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
        schedule.step()
    return optimizer


@functools.cache
def _trained(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MAKERS[name]()
        train(model, 80 if name == "plain" else 40, lr=0.05)
    return model


def trained(name: str) -> nn.Module:
    """Return a fresh copy in training mode."""
    return copy.deepcopy(_trained(name))
