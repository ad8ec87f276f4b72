"""Networks with batch normalization in plain torch, written as in most code: layers, activations and additions apart.

Sources: He et al. 2016, table 1; Sandler et al. 2018, table 2; Huang et al. 2017, table 1 (DenseNet-121); Tan and Le
2019, table 1 (EfficientNet-B0, here without stochastic depth); Ronneberger et al. 2015, with the residual blocks of
Zhang et al. 2018.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 1000


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


def _conv_norm(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, activation: type[nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Return convolution, batch normalization and activation, in place like torchvision's."""
    layers: list[nn.Module] = [_conv(inputs, outputs, size, stride, groups), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is nn.Identity else [activation(inplace=True)]))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = _conv_norm(inputs, width, 1, stride, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.norm1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _conv_norm(inputs, outputs, 1, stride, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A ResNet; `depths` and `width` give smaller versions."""

    def __init__(self, block: type[_BasicBlock | _Bottleneck], depths: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        self.stem = _conv_norm(3, width, 7, 2)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(block(inputs, width << stage, 2 if i == 0 and stage > 0 else 1))
                inputs = block.expansion * (width << stage)
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        return self.classifier(self.blocks(x).mean((2, 3)))


def resnet18(depths: tuple[int, ...] = (2, 2, 2, 2), width: int = 64) -> ResNet:
    return ResNet(_BasicBlock, depths, width)


def resnet50(depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64) -> ResNet:
    return ResNet(_Bottleneck, depths, width)


class _SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(scale))


class _InvertedResidual(nn.Module):
    """The block of MobileNetV2 and, with squeeze and excitation, of EfficientNet."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int, expansion: int, activation: type[nn.Module], se: bool
    ) -> None:
        super().__init__()
        wide = inputs * expansion
        parts: list[nn.Module] = [] if expansion == 1 else [_conv_norm(inputs, wide, 1, activation=activation)]
        parts.append(_conv_norm(wide, wide, size, stride, groups=wide, activation=activation))
        parts += [_SqueezeExcitation(wide, max(1, inputs // 4))] if se else []
        parts.append(_conv_norm(wide, outputs, 1, activation=nn.Identity))
        self.parts = nn.Sequential(*parts)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.parts(x) if self.adds else self.parts(x)


class _MobileNet(nn.Module):
    """A stem, inverted residual blocks, and a head.

    Args:
        settings: For each stage: expansion, output channels, blocks, stride and kernel size.
        activation: The activation after normalization.
        se: Whether the blocks use squeeze and excitation.
    """

    def __init__(self, settings: tuple[tuple[int, ...], ...], activation: type[nn.Module], se: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = [_conv_norm(3, 32, 3, 2, activation=activation)]
        inputs = 32
        for expansion, outputs, blocks, stride, size in settings:
            for i in range(blocks):
                step = stride if i == 0 else 1
                parts.append(_InvertedResidual(inputs, outputs, size, step, expansion, activation, se))
                inputs = outputs
        parts.append(_conv_norm(inputs, 1280, 1, activation=activation))
        self.features = nn.Sequential(*parts)
        self.dropout, self.classifier = nn.Dropout(0.2), nn.Linear(1280, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.features(x).mean((2, 3))))


def mobilenet_v2() -> nn.Module:
    settings = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    return _MobileNet(settings, nn.ReLU6, se=False)


def efficientnet_b0() -> nn.Module:
    settings = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )  # fmt: skip
    return _MobileNet(settings, nn.SiLU, se=True)


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), _conv(4 * growth, growth, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class _DenseBlock(nn.Module):
    def __init__(self, inputs: int, layers: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_DenseLayer(inputs + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, layers: tuple[int, ...], growth: int) -> None:
        super().__init__()
        channels = 2 * growth
        parts: list[nn.Module] = [_conv_norm(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
        for i, count in enumerate(layers):
            parts.append(_DenseBlock(channels, count, growth))
            channels += count * growth
            parts += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            if i < len(layers) - 1:
                parts += [_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
                channels //= 2
        self.features, self.classifier = nn.Sequential(*parts), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def densenet121() -> nn.Module:
    return DenseNet((6, 12, 24, 16), growth=32)


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3)
        self.second = _conv_norm(outputs, outputs, 3, activation=nn.Identity)
        self.shortcut = _conv_norm(inputs, outputs, 1, activation=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class UNet(nn.Module):
    """A U-Net with residual blocks, for two classes of pixels."""

    def __init__(self, width: int = 16, levels: int = 4) -> None:
        super().__init__()
        widths = [width << i for i in range(levels)]
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_ResidualBlock(*pair) for pair in [(3, width), *pairs])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(deep, wide, 2, 2) for wide, deep in reversed(pairs))
        self.up = nn.ModuleList(_ResidualBlock(deep, wide) for wide, deep in reversed(pairs))
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skipped.append(x)
        for grow, block, wide in zip(self.grow, self.up, reversed(skipped[:-1]), strict=True):
            x = block(torch.cat([wide, grow(x)], 1))
        return self.last(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
    "DenseNet-121": densenet121,
    "EfficientNet-B0": efficientnet_b0,
    "residual U-Net": UNet,
}


def without_norm(model: nn.Module) -> nn.Module:
    """Return a copy of a network without its batch normalization."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            holder, _, name = path.rpartition(".")
            setattr(model.get_submodule(holder), name, nn.Identity())
    return model
