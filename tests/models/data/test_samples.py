"""The number of samples in a batch, from its structure alone and with the shape that reached the first layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import batchnorm as bn
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.data.samples import samples_in


def images(n: int, *, ragged: bool = False) -> list[Tensor]:
    return [torch.randn(3, 9 + i * ragged, 9) for i in range(n)]


def targets(n: int) -> list[dict[str, Tensor]]:
    return [{"boxes": torch.rand(1 + i % 3, 4), "labels": torch.ones(1 + i % 3)} for i in range(n)]


X, Y = torch.randn(8, 3, 9, 9), torch.arange(8)
BY_STRUCTURE: dict[str, tuple[Any, int]] = {
    "tensor": (X, 8),
    "array": (X.numpy(), 8),
    "tensor and labels": ([X, Y], 8),
    "names and tensor": (("train", X), 8),
    "no tensors": ({"name": "a"}, 1),
    "scalar": (torch.tensor(3.0), 1),
    "empty batch": ([X[:0], Y[:0]], 0),
    "dict": ({"x": X, "names": ["a"] * 8}, 8),
    "nested dict": (({"image": X, "age": Y}, Y), 8),
    "several inputs": (((X, X), Y), 8),
    "several inputs of other shapes": (((X, X.flatten(1)), Y), 8),
    "boxes of all images in one tensor": ((X, torch.rand(20, 5)), 8),
    "list of images": ((images(8),), 8),
    "images and targets": ((tuple(images(8)), tuple(targets(8))), 8),
    "images and labels": ((images(5), Y[:5]), 5),
    "ragged images": ((images(8, ragged=True),), 8),
    "as many images as channels": ((images(3), targets(3)), 3),
    "list of arrays": (([np.zeros((3, 9, 9), np.float32)] * 8, [0] * 8), 8),
    "dict of images": ({"pixel_values": images(8), "labels": targets(8)}, 8),
    "list of dicts": ([{"image": image, "height": 9} for image in images(8)], 8),
    "inputs and targets as dicts": ([{"x": X}, {"y": Y}], 8),
    "jagged tensor": (torch.nested.nested_tensor(images(8, ragged=True), layout=torch.jagged), 8),
    "packed sequence": ((pack_sequence([torch.randn(5, 2), torch.randn(3, 2)]), Y[:2]), 2),
    "sparse": ((X[:, 0].to_sparse(), Y), 8),
}
BY_SHAPE: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "unbatched": (X[0], (1, 4, 9, 9), 1),
    "unbatched with a label": ((X[0], 5), (1, 4, 9, 9), 1),
    "one sample": (X[:1], (1, 4, 9, 9), 1),
    "several inputs, no labels": (((X, X),), (8, 4, 9, 9), 8),
    "several inputs in one call": (((X, X), Y), (16, 4, 9, 9), 8),
    "crops of all samples": (([X] * 10,), (16, 4, 9, 9), 8),
    "clips of several frames": ((list(torch.randn(4, 8, 3, 9, 9)), Y[:4]), (32, 4, 9, 9), 4),
    "the batch is a list of images": (images(8), (8, 4, 9, 9), 8),
    "as many images as a multiple of the channels": (images(9), (9, 4, 9, 9), 9),
    "flattened positions": ((torch.randn(8, 5, 3), Y), (40, 3), 8),
    "list of dicts, and several values of each": ([{"image": i} for i in images(8)], (24, 4), 8),
    "list of one dict of tensors": ([{"x": X}], (8, 4, 9, 9), 8),
    "regions of images": ((X, Y), (37, 4), 8),
    "channels transposed into the first place": (X, (1, 4, 72, 9), 8),
}


@pytest.mark.parametrize("kind", BY_STRUCTURE)
def test_samples_by_structure(kind: str) -> None:
    batch, expected = BY_STRUCTURE[kind]
    assert samples_in(batch) == expected
    assert samples_in(batch, (expected, 4, 9, 9)) == expected


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_samples_of_a_nested_tensor() -> None:
    assert samples_in((torch.nested.nested_tensor(images(8, ragged=True)), Y)) == 8


@pytest.mark.parametrize("kind", BY_SHAPE)
def test_samples_by_the_shape_that_reaches_a_layer(kind: str) -> None:
    batch, shape, expected = BY_SHAPE[kind]
    assert samples_in(batch, shape) == expected


class Detector(nn.Module):
    """Takes a list of images `[3, H, W]`, or one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, given: list[Tensor] | Tensor) -> Tensor:
        x = given if isinstance(given, Tensor) else torch.stack(list(given))
        y: Tensor = self.norm(self.conv(x if x.dim() == 4 else x[None]))
        return y


STACKED = [torch.randn(8, 3, 9, 9) + 1 for _ in range(5)]
GIVEN: dict[str, Any] = {
    "lists": [(list(x), targets(8)) for x in STACKED],
    "dicts": [{"given": list(x)} for x in STACKED],
    "lists with forward": [list(x) for x in STACKED],
    "unbatched": [(image, 1) for x in STACKED for image in x],
}


@pytest.mark.parametrize("passes", ["single", "sequential", "sequential, nothing kept"])
@pytest.mark.parametrize("given", GIVEN)
def test_recalibrate_counts_the_samples(given: str, passes: str) -> None:
    model, data = Detector(), GIVEN[given]
    options: dict[str, Any] = {"passes": passes.partition(",")[0], "prior": 10.0}
    if "nothing" in passes:
        options["cache_bytes"] = 0
    if "forward" in given:
        options["forward"] = lambda model, batch: model(batch)
    found = bn.recalibrate(model, data, **options)
    assert found.report.samples == 40
    expected = bn.recalibrate(model, STACKED, **options)
    torch.testing.assert_close(found.model.norm.running_var, expected.model.norm.running_var)
    few = bn.recalibrate(model, data, max_samples=16, **options).report
    assert few.samples == 16
    assert few.batches == (16 if given == "unbatched" else 2)


@pytest.mark.parametrize("given", GIVEN)
def test_diagnose_counts_the_samples(given: str) -> None:
    torch.manual_seed(0)
    model = Detector()
    forward = (lambda model, batch: model(batch)) if "forward" in given else None
    found = bn.diagnose(model, GIVEN[given], forward=forward, max_samples=24)
    one_by_one = [image[None] for x in STACKED[:3] for image in x]
    expected = bn.diagnose(model, one_by_one if given == "unbatched" else STACKED[:3])
    assert (found.samples, found.batches) == (24, len(one_by_one) if given == "unbatched" else 3)
    traced = {"BN110"}  # lists of tensors cannot be traced
    assert [f for f in found.findings if f.code not in traced] == [f for f in expected.findings if f.code not in traced]


def test_lists_of_samples_are_not_cut() -> None:
    for inputs in (Inputs.of((images(4),)), Inputs.of({"x": images(4)}), Inputs.of(({"x": images(4)},))):
        assert inputs.first(2) is inputs
        assert all(x.shape[0] == 3 for choice in inputs.resized() for other in choice for x in other.tensors())
    assert Inputs.of((X, {"mask": X})).first(2).tensors()[1].shape[0] == 2
