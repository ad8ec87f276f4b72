"""Modules with a defect of batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from tests.doctor.networks import Plain


class Checkpointed(nn.Module):
    def __init__(self, network: Plain) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        for block in self.network.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.network.head(x.mean((2, 3)))


class Table(nn.Module):
    """A network for tables, which normalizes its columns first."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.BatchNorm1d(8)
        self.hidden = nn.Sequential(nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.columns(x))


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


class WithActivation(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class OnlyNamed(bn.BatchNorm2d):
    """A subclass that keeps the `forward` of this library's layer."""


class AlwaysTraining(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps
        )


class Sequences(nn.Module):
    """A network for sequences `[N, C, L]`, most of which end early."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(42, 32, 3, 1, 1, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
            nn.Conv1d(32, 32, 3, 2, 1, bias=False),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(2))
