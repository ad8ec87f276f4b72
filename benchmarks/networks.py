"""ResNet-18 and a depthwise network in the style of MobileNetV2, which take their normalization as an argument.

The normalization includes the activation and the residual addition after it, so that a fused layer can compute all
three: `norm(channels, activation)` returns a module that is called with x and, in some places, a residual.

Sources: He et al. 2016, table 1 (18 layers); Sandler et al. 2018, table 2 (with fewer blocks).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm

Norm = Callable[[int, str], nn.Module]


class _Unfused(nn.Module):
    """A layer, an addition and an activation in sequence, in place like torchvision's."""

    def __init__(self, norm: nn.Module, activation: str) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y = y + residual if y is x else y.add_(residual)
        if self.activation == "none":
            return y
        return F.relu(y, inplace=True) if self.activation == "relu" else F.hardtanh(y, 0.0, 6.0, inplace=True)


def torch_norm(channels: int, activation: str) -> nn.Module:
    return _Unfused(nn.BatchNorm2d(channels), activation)


def no_norm(channels: int, activation: str) -> nn.Module:
    return _Unfused(nn.Identity(), activation)


def our_norm(channels: int, activation: str) -> nn.Module:
    return batchnorm.BatchNormAct2d(channels, activation=activation)


NORMS: dict[str, Norm] = {"batchnorm": our_norm, "torch": torch_norm, "none": no_norm}


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class _BasicBlock(nn.Module):
    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, 3, stride), norm(outputs, "relu")
        self.conv2, self.norm2 = _conv(outputs, outputs, 3), norm(outputs, "relu")
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs, "none"))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, norm: Norm, classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.norm = _conv(3, 64, 7, 2), norm(64, "relu")
        blocks, inputs = [], 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [_BasicBlock(norm, inputs, outputs, stride), _BasicBlock(norm, outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)), 3, 2, 1)
        return self.classifier(self.blocks(x).mean((2, 3)))


class _InvertedResidual(nn.Module):
    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = nn.Sequential(_conv(inputs, wide, 1), norm(wide, "relu6")) if expansion != 1 else nn.Identity()
        self.depthwise = nn.Sequential(_conv(wide, wide, 3, stride, groups=wide), norm(wide, "relu6"))
        self.project, self.norm = _conv(wide, outputs, 1), norm(outputs, "none")
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return self.norm(y, x) if self.adds else self.norm(y)


class DepthwiseNet(nn.Module):
    def __init__(self, norm: Norm, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 3, 2), norm(32, "relu6"))
        blocks, inputs = [], 32
        settings = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 2), (6, 96, 2, 1), (6, 160, 2, 2))
        for expansion, outputs, repeats, stride in settings:
            for i in range(repeats):
                blocks.append(_InvertedResidual(norm, inputs, outputs, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(_conv(inputs, 640, 1), norm(640, "relu6"))
        self.classifier = nn.Linear(640, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.blocks(self.stem(x))).mean((2, 3)))


NETWORKS: dict[str, Callable[[Norm], nn.Module]] = {"ResNet-18": ResNet18, "depthwise": DepthwiseNet}


def same_weights(model: nn.Module, source: nn.Module) -> None:
    """Copy the weights of another network of the same kind; both list them in the same order."""
    with torch.no_grad():
        for own, other in zip(model.parameters(), source.parameters(), strict=True):
            own.copy_(other)
