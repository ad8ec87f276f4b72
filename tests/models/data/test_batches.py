"""A model gets its own copy of a batch, in every structure, because it may write into its inputs."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import batchnorm as bn
from batchnorm.compare.training.measurements import _loss_and_accuracy
from batchnorm.doctor.pytorch.inspection import inspect_layers
from batchnorm.models.data.batches import as_tensors, own_copy


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    label: int


class Encoding(collections.UserDict[str, Any]):
    """As the encodings of Hugging Face: a mapping that moves itself in place."""

    def to(self, device: torch.device) -> Encoding:
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Graph:
    """As the graphs of PyTorch Geometric."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> Graph:
        return self

    def clone(self) -> Graph:
        return Graph(self.x.clone())


X = torch.randn(4, 3, 6, 6) + 1
STRUCTURES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "tensor": (lambda x: x, lambda b: b),
    "list": (lambda x: [x, "name"], lambda b: b[0]),
    "tuple": (lambda x: (x, 3), lambda b: b[0]),
    "dict": (lambda x: {"x": x}, lambda b: b["x"]),
    "named tuple": (lambda x: Pair(x, x), lambda b: b.y),
    "data class": (lambda x: Record(x, 1), lambda b: b.x),
    "nested": (lambda x: [{"a": [(x, None)]}], lambda b: b[0]["a"][0][0]),
    "array": (lambda x: (x.numpy(),), lambda b: b[0]),
    "encoding": (lambda x: Encoding(x=x), lambda b: b["x"]),
    "graph": (Graph, lambda b: b.x),
}


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_own_copy_has_the_structure_and_no_memory_of_the_batch(structure: str, device: torch.device | None) -> None:
    make, part = STRUCTURES[structure]
    x = X.clone()
    batch = make(x)
    own = own_copy(batch, device)
    assert type(own) is type(batch)
    assert type(part(own)) is Tensor
    part(own).zero_()
    assert torch.equal(x, X)
    assert torch.equal(torch.as_tensor(part(as_tensors(batch))), X)


def test_own_copy_of_special_tensors() -> None:
    packed = pack_sequence([torch.ones(5, 2), torch.ones(3, 2)])
    own = own_copy(packed, None)
    own.data.zero_()
    assert isinstance(own, PackedSequence)
    assert packed.data.all()
    leaf = torch.ones(3, requires_grad=True)
    copied = own_copy(leaf, None)
    copied.sum().backward()
    assert copied.is_leaf
    assert leaf.grad is None
    last = X.to(memory_format=torch.channels_last)
    assert own_copy(last, None).is_contiguous(memory_format=torch.channels_last)
    objects = np.array([{}, None], dtype=object)
    assert own_copy(objects, None) is not objects


class Normalizing(nn.Module):
    """Normalizes its input, in place or not, in whatever structure it comes."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.after, self.last = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sub_(1.0).div_(2.0) if self.inplace else x.sub(1.0).div(2.0)
        y: Tensor = self.last(self.after(self.norm(self.conv(x)).relu()))
        return y


DATA = [torch.randn(4, 3, 8, 8) + 1 for _ in range(3)]


def forward_of(structure: str) -> Callable[[nn.Module, Any], Any]:
    return lambda model, batch: model(STRUCTURES[structure][1](batch))


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_recalibrate_a_model_that_writes_into_its_input(structure: str, passes: str, cache_bytes: int) -> None:
    options: dict[str, Any] = {"passes": passes, "cache_bytes": cache_bytes}
    expected = bn.recalibrate(Normalizing(False), DATA, **options).model
    given = [x.clone() for x in DATA]
    data = [STRUCTURES[structure][0](x) for x in given]
    found = bn.recalibrate(Normalizing(True), data, forward=forward_of(structure), **options).model
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), buffer)
    assert all(map(torch.equal, given, DATA))


@pytest.mark.parametrize("structure", ["tensor", "nested", "array"])
def test_diagnose_leaves_the_batches_as_they_are(structure: str) -> None:
    given = [x.clone() for x in DATA]
    data = [STRUCTURES[structure][0](x) for x in given]
    found = bn.diagnose(Normalizing(True), data, forward=forward_of(structure))
    expected = bn.diagnose(Normalizing(False), DATA)
    assert all(map(torch.equal, given, DATA))
    assert found.measures == expected.measures


FUNCTIONS: dict[str, Callable[[Tensor], object]] = {
    "insert_batchnorm": lambda x: bn.insert_batchnorm(Normalizing(True), nn.Conv2d, [x]),
    "accelerate": lambda x: bn.accelerate(Normalizing(True), x),
    "drop_redundant_bias": lambda x: bn.drop_redundant_bias(Normalizing(True), example_inputs=x),
    "fold": lambda x: bn.fold(Normalizing(True), x),
    "fold in place": lambda x: bn.fold(Normalizing(True), x, inplace=True),
    "inspect_layers": lambda x: inspect_layers(Normalizing(True), x),
    "the evaluation of a comparison": lambda x: _loss_and_accuracy(
        nn.Sequential(Normalizing(True), nn.Flatten(), nn.LazyLinear(2)), x, torch.zeros(len(x), dtype=torch.long)
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_are_left_as_they_are(name: str) -> None:
    x = DATA[0].clone()
    with torch.set_grad_enabled("comparison" not in name):
        FUNCTIONS[name](x)
    assert torch.equal(x, DATA[0])
