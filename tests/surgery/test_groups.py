"""`parameter_groups`: every parameter once, batch normalization's without weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.surgery.groups import parameter_groups
from tests.surgery import networks


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    of = {id(p): name for name, p in model.named_parameters()}
    assert len({id(p) for p in parameters}) == len(parameters)
    return {of[id(p)] for p in parameters}


@pytest.mark.parametrize("kind", [networks.ResNet, networks.MobileNet, networks.Network3d])
def test_every_parameter_is_in_one_group(kind: type[nn.Module]) -> None:
    model = kind()
    decayed, undecayed = parameter_groups(model, weight_decay=1e-2)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (1e-2, 0.0)
    without = names(model, undecayed["params"])
    norms = {path for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert without == {f"{path}.{name}" for path in norms for name in ("weight", "bias")}
    assert names(model, decayed["params"]) == {name for name, _ in model.named_parameters()} - without


def test_decay_leaves_them_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), bn.BatchNormAct1d(4))
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.5), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, False, False, False, False]


def test_other_kinds_and_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.PReLU())
    _, undecayed = parameter_groups(model, 0.1, kinds=(nn.LayerNorm, nn.PReLU))
    assert names(model, undecayed["params"]) == {"2.weight", "2.bias", "3.weight"}
    _, undecayed = parameter_groups(model, 0.1, biases=True)
    assert names(model, undecayed["params"]) == {"0.bias", "1.weight", "1.bias", "2.bias"}
    _, undecayed = parameter_groups(model, 0.1, kinds=lambda m: not list(m.children()) and not isinstance(m, nn.Linear))
    assert names(model, undecayed["params"]) == {"1.weight", "1.bias", "2.weight", "2.bias", "3.weight"}


def test_shared_parameters_come_once() -> None:
    layer = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), layer), "b": layer, "c": nn.Linear(4, 4)})
    model["c"].bias = layer.bias
    decayed, undecayed = parameter_groups(model, 0.1)
    assert len(decayed["params"]) == 3
    assert [id(p) for p in undecayed["params"]] == [id(layer.weight), id(layer.bias)]


def test_empty_groups_are_left_out() -> None:
    assert [g["weight_decay"] for g in parameter_groups(nn.Linear(2, 2), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in parameter_groups(nn.BatchNorm1d(2), 0.1)] == [0.0]


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="expects a torch.nn.Module, got list"):
        parameter_groups([], 0.1)
    with pytest.raises(ValueError, match="got ReLU with none"):
        parameter_groups(nn.ReLU(), 0.1)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expects a finite weight_decay >= 0, got"):
            parameter_groups(nn.Linear(2, 2), wrong)
