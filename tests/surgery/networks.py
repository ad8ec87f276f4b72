"""Networks of the kinds that people train, as they write them, in small."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """One `relu` called twice, as torchvision's."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 8)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 12, stride=2), BasicBlock(12, 12))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class InvertedResidual(nn.Module):
    """The last layer has no activation; it is added by the module around its `Sequential`."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.Hardswish(),
            InvertedResidual(6, 6, 1, 2),
            InvertedResidual(6, 8, 2, 3),
            InvertedResidual(8, 8, 1, 3),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """Takes the list of all features before it, or one tensor, and asks which."""

    def __init__(self, inputs: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(2 * growth, growth)
        self.drop_rate = drop_rate

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        new = self.conv2(self.relu2(self.norm2(bottleneck)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class DenseBlock(nn.ModuleDict):
    def __init__(self, inputs: int, growth: int, layers: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth, drop_rate))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.conv0 = conv3x3(3, 6)
        self.block1 = DenseBlock(6, 4, 2, drop_rate)
        self.transition = nn.Sequential(nn.BatchNorm2d(14), nn.ReLU(), nn.Conv2d(14, 7, 1), nn.AvgPool2d(2))
        self.block2 = DenseBlock(7, 4, 2, drop_rate)
        self.norm5 = nn.BatchNorm2d(15)
        self.classifier = nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm5(self.block2(self.transition(self.block1(self.conv0(x)))))
        out = F.relu(features, inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm1(self.conv1(x)))
        return F.leaky_relu(self.norm2(self.conv2(x)), 0.1)


class UNet(nn.Module):
    """Shapes decide the padding, so that the whole cannot be traced everywhere; its parts can."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down = DoubleConv(3, 6), DoubleConv(6, 10)
        self.up = nn.ConvTranspose2d(10, 6, 2, stride=2)
        self.conv = DoubleConv(12, 6)
        self.outc = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.inc(x)
        up = self.up(self.down(F.max_pool2d(first, 2)))
        if up.shape[2:] != first.shape[2:]:
            up = F.interpolate(up, size=first.shape[2:])
        return self.outc(self.conv(torch.cat([first, up], 1)))


class Residual3d(nn.Module):
    """The shortcut comes first, and both sides of the addition are batch normalization."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv3d(inputs, outputs, 1), nn.BatchNorm3d(outputs))
        self.body = nn.Sequential(
            nn.Conv3d(inputs, outputs, 3, padding=1),
            nn.BatchNorm3d(outputs),
            nn.GELU(),
            nn.Conv3d(outputs, outputs, 3, padding=1),
            nn.BatchNorm3d(outputs),
        )
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        return self.act(self.body(x).add(shortcut))


class Network3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual3d(3, 4), Residual3d(4, 6)])
        self.pool = nn.MaxPool3d(2)
        self.fc1, self.bn, self.fc2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.pool(block(x))
        return self.fc2(F.relu(self.bn(self.fc1(x.mean((2, 3, 4))))))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    # the network, a sample's shape, its batch normalizations, and how many of them are fused
    "resnet": (ResNet, (3, 12, 12), 10, 9),
    "mobilenet": (MobileNet, (3, 12, 12), 10, 9),
    "densenet": (DenseNet, (3, 12, 12), 10, 10),
    "unet": (UNet, (3, 11, 11), 6, 6),
    "3d": (Network3d, (3, 6, 6, 6), 7, 5),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    make, shape, _, _ = NETWORKS[name]
    return make().double(), torch.randn(8, *shape, dtype=torch.float64)
