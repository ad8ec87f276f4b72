"""A folded network returns the containers that the original returns."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import batchnorm as bn
from batchnorm.models.data.outputs import difference

X = torch.randn(4, 3, 8, 8)


class Pair(NamedTuple):
    first: Tensor
    second: Any = None


@dataclass
class Data:
    logits: Tensor
    more: Any = None


@dataclass
class Computed:
    logits: Tensor
    half: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.half = self.logits / 2


@dataclass(slots=True)
class Slots:
    logits: Tensor


@dataclass
class Doubled:
    """Created from its own contents, it would hold twice as much."""

    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = self.logits * 2


class Noted(dict[str, Any]):
    """A dictionary with an attribute that it is not created with."""

    note: Tensor


def noted(y: Tensor) -> Noted:
    found = Noted(a=y)
    found.note = y + 1
    return found


class Plain:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Registered(Plain):
    """A node of torch's pytrees."""


pytree.register_pytree_node(Registered, lambda r: ([r.value], None), lambda values, _: Registered(next(iter(values))))


def local_class(y: Tensor) -> Any:
    @dataclass
    class Local:
        value: Tensor

    return Local(y)


def model_output(y: Tensor) -> Any:
    from transformers.modeling_outputs import ImageClassifierOutput

    return ImageClassifierOutput(logits=y, hidden_states=(y, y + 1))


CONTAINERS = {
    "tuple": lambda y: (y, [y, {"a": y}]),
    "OrderedDict": lambda y: OrderedDict(out=y, aux=[y]),
    "OrderedDict of numbers": lambda y: OrderedDict({0: y, 1: y}),
    "defaultdict": lambda y: defaultdict(list, {"a": y}),
    "NamedTuple": lambda y: Pair(y, Pair(y)),
    "dataclass": lambda y: Data(y, {"a": Data(y)}),
    "dataclass with slots": lambda y: Slots(y),
    "dataclass with computed fields": lambda y: Computed(y),
    "dataclass that changes its fields": lambda y: Doubled(y),
    "subclass of dict": noted,
    "class": lambda y: [Plain(y)],
    "pytree": lambda y: Registered(y),
    "local class": local_class,
    "namespace": lambda y: SimpleNamespace(value=y),
    "distribution": lambda y: torch.distributions.Normal(y, 1.0, validate_args=False),
    "model output": model_output,
    "list of model outputs": lambda y: [model_output(y)],
}
WHOLE = ("tuple", "OrderedDict", "OrderedDict of numbers", "NamedTuple", "dataclass", "model output")


class Net(nn.Module):
    def __init__(self, container: str, decides: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.container, self.decides = container, decides

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        y = self.last(y.relu().mean((2, 3)))
        if self.decides and x.shape[0] > 100:  # not traceable by torch.fx
            y = y + 1
        return CONTAINERS[self.container](y)


def trained(container: str, decides: bool = False) -> nn.Module:
    model = Net(container, decides).eval()
    model.norm.running_mean.normal_()
    return model


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_folded_network_returns_the_same_containers(container: str) -> None:
    model = trained(container)
    folded, report = bn.fold(model, X)
    assert report.how == "fx" if container in WHOLE else report.how in ("fx", "export", "modules")
    with torch.no_grad():
        expected = model(X)
        for network in (folded, copy.deepcopy(folded)):
            found = network(X)
            assert type(found).__qualname__ == type(expected).__qualname__
            assert difference(expected, found).relative < 1e-5


@pytest.mark.parametrize("container", ["dataclass", "model output", "NamedTuple"])
def test_containers_outlive_pickling(container: str) -> None:
    model = trained(container)
    folded, report = bn.fold(model, X)
    assert report.remaining == 0
    loaded = pickle.loads(pickle.dumps(folded))
    with torch.no_grad():
        assert difference(model(X), loaded(X)).relative < 1e-5


@pytest.mark.parametrize("container", ["OrderedDict", "NamedTuple", "dataclass", "model output"])
def test_a_network_that_only_export_traces_returns_the_same_containers(container: str) -> None:
    model = trained(container, decides=True)
    folded, report = bn.fold(model, X)
    assert report.how in ("export", "modules")
    with torch.no_grad():
        assert difference(model(X), folded(X)).relative < 1e-5


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("example", [X, None])
def test_an_accelerated_network_returns_the_same_containers(container: str, example: Tensor | None) -> None:
    model = trained(container)
    faster, report = bn.accelerate(model, example)
    assert report.changed
    with torch.no_grad():
        assert difference(model(X), faster(X)).relative < 1e-5
