"""Networks with channels to prune."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm
from batchnorm import walk
from batchnorm.models.gate import relative
from batchnorm.nn import BatchNormAct2d
from tests.surgery.networks import NETWORKS, network


def vgg() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.SiLU(), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(12 * 4, 10), nn.BatchNorm1d(10), nn.PReLU(10), nn.Linear(10, 4, bias=False)]
    return nn.Sequential(*layers, *head).double(), torch.randn(4, 3, 14, 14).double()


def transformers_resnet() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[12, 16], depths=[2, 1], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config).double(), torch.randn(2, 3, 16, 16).double()


class Excited(nn.Module):
    """A gate multiplies the channels, and the network's second input shifts them all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8)
        self.squeeze, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.out = nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        gate = torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out(x * gate)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    **{name: (lambda name=name: network(name)) for name in NETWORKS},
    "vgg": vgg,
    "excited": lambda: (Excited().double(), torch.randn(2, 3, 9, 9).double()),
    "transformers": transformers_resnet,
    "depthwise": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.GELU(),
            nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12), nn.Softplus(),
            nn.ConvTranspose2d(12, 12, 1, groups=12), nn.Conv2d(12, 4, 1, bias=False),
        ).double(),
        torch.randn(2, 3, 7, 7).double(),
    ),
    "transposed": lambda: (
        nn.Sequential(
            nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2),
        ).double(),
        torch.randn(2, 3, 5, 5).double(),
    ),
    "channels last": lambda: (
        nn.Sequential(
            nn.Linear(4, 8), batchnorm.nn.BatchNorm1d(8, channel_dim=-1), nn.GELU(), nn.Linear(8, 3),
        ).double(),
        torch.randn(3, 6, 4).double(),
    ),
    "sequences": lambda: (
        nn.Sequential(
            nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Tanh(), nn.AvgPool1d(2), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6),
            nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
        ).double(),
        torch.randn(3, 4, 20).double(),
    ),
}  # fmt: skip


def slimmed(model: nn.Module, zeros: float = 0.4, *, negative: bool = True, seed: int = 0) -> nn.Module:
    """Give the model the statistics and parameters of a trained one, and some γ = 0, with β < 0 or any β."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (found.module for found in walk.norm_layers(model)):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.weight.uniform_(0.5, 1.5, generator=generator)
            layer.bias.normal_(generator=generator)
            which = torch.rand(layer.num_features, generator=generator) < zeros
            layer.weight[which] = 0
            if negative:
                layer.bias[which] = -layer.bias[which].abs()
    return model


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = NETS[name]()
    return slimmed(model, **options), x


@torch.no_grad()
def error(model: nn.Module, other: nn.Module, x: Tensor, *, training: bool = False) -> float:
    results = []
    for each in (model, other):
        torch.manual_seed(1)
        found = copy.deepcopy(each).train(training)(x)
        results.append(found if isinstance(found, Tensor) else found.logits)
    return relative(*results)


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (path, module.training, dict(module._forward_hooks), {k: v for k, v in vars(module).items() if k[0] != "_"})
        for path, module in model.named_modules()
    ]
