"""The optimizers that can be chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that can be chosen by name.

    Attributes:
        build: `build(parameters, lr=...)` returns the optimizer.
        lr: Its default learning rate.
        title: Its name in a sentence.
    """

    build: Callable[..., torch.optim.Optimizer]
    lr: float
    title: str


def _momentum(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


OPTIMIZERS = {
    "sgd": OptimizerKind(torch.optim.SGD, 0.1, "stochastic gradient descent"),
    "momentum": OptimizerKind(_momentum, 0.01, "stochastic gradient descent with momentum 0.9"),
    "adam": OptimizerKind(torch.optim.Adam, 1e-3, "Adam"),
    "adamw": OptimizerKind(torch.optim.AdamW, 1e-3, "AdamW"),
    "rmsprop": OptimizerKind(torch.optim.RMSprop, 1e-3, "RMSprop"),
}
