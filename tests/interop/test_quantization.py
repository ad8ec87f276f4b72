"""Quantization by torch: each method of the guide, and errors and warnings for layers that torch cannot quantize."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.testing import assert_close

import batchnorm as bn
from tests.surgery import networks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning"),  # which moves to torchao
    pytest.mark.filterwarnings(
        "ignore:.*(reduce_range|must run observer|are deprecated and will be removed):UserWarning"
    ),
]
X = torch.linspace(-1, 2, 4 * 3 * 12 * 12).sin().reshape(4, 3, 12, 12)
TRAINED = quantization.get_default_qat_qconfig_mapping("fbgemm")
AFTER = quantization.get_default_qconfig_mapping("fbgemm")
FIX = r"Convert the model first, with batchnorm.convert\(model, torch.nn\), or fold it in evaluation"


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    for _ in range(3):
        model(X)
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


class Given(nn.Module):
    """Call a layer with its arguments besides x."""

    def __init__(self, layer: nn.Module, *extra: Any) -> None:
        super().__init__()
        self.conv, self.norm, self.extra = nn.Conv2d(3, 4, 3), layer, extra

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), *self.extra)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: Given(bn.BatchNorm2d(4)),
    "BatchNormAct2d": lambda: Given(bn.BatchNormAct2d(4)),
    "BatchRenorm2d": lambda: Given(bn.BatchRenorm2d(4)),
    "GhostBatchNorm2d": lambda: Given(bn.GhostBatchNorm2d(4, ghost_size=2)),
    "SyncBatchNorm": lambda: Given(bn.SyncBatchNorm(4)),
    "DomainBatchNorm2d": lambda: Given(bn.DomainBatchNorm2d(4, num_domains=2), 1),
    "ConditionalBatchNorm2d": lambda: Given(bn.ConditionalBatchNorm2d(4, num_classes=2), 1),
    "DecorrelatedBatchNorm2d": lambda: Given(bn.DecorrelatedBatchNorm2d(4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_quantization_aware_training_refuses_this_librarys_layers(name: str) -> None:
    model = LAYERS[name]().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name} expects to be converted before quantization-aware training.*{FIX}"):
        prepare_qat_fx(model, TRAINED, (X,))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.fx.symbolic_trace(model)(X).shape == (4, 4, 10, 10)  # other tracers are not concerned


@pytest.mark.parametrize("name", [*LAYERS, "FrozenBatchNorm2d"])
def test_a_layer_that_stays_in_floating_point_gives_a_warning(name: str) -> None:
    make = LAYERS.get(name, lambda: Given(bn.FrozenBatchNorm2d(4)))
    model = make().train()
    model(X)
    with pytest.warns(UserWarning, match=rf"{name} stays in floating point, and is not fused.*{FIX}"):
        prepared = prepare_fx(model.eval(), AFTER, (X,))
    assert_close(prepared(X), model(X))


@pytest.mark.parametrize(("make", "accelerated"), [(plain, False), (networks.ResNet, True)])
def test_quantization_aware_training(make: Callable[[], nn.Module], accelerated: bool) -> None:
    model = trained(make)
    ours = bn.accelerate(model, X).model if accelerated else bn.convert(model, bn.nn).model
    prepared = prepare_qat_fx(bn.convert(ours, torch.nn).model.train(), TRAINED, (X,))
    expected = prepare_qat_fx(copy.deepcopy(model).train(), TRAINED, (X,))
    assert kinds(prepared) == kinds(expected)
    assert any("ConvBn" in kind for kind in kinds(prepared))
    assert torch.equal(prepared(X), expected(X))
    prepared(X).sum().backward()
    before = statistics(prepared.eval())
    prepared(5 * X + 3)
    assert all(torch.equal(value, before[name]) for name, value in statistics(prepared).items())
    quantized = convert_fx(prepared)
    assert not any("BatchNorm" in kind for kind in kinds(quantized))
    assert quantized(X).isfinite().all()


@pytest.mark.parametrize(("make", "way"), [(plain, "convert"), (networks.ResNet, "convert"), (networks.ResNet, "fold")])
def test_after_training(make: Callable[[], nn.Module], way: str) -> None:
    model = bn.accelerate(trained(make), X).model.eval()
    ready = bn.convert(model, torch.nn).model if way == "convert" else bn.fold(model, X).model
    prepared = prepare_fx(ready, AFTER, (X,))
    prepared(X)
    quantized = convert_fx(prepared)
    assert not any("BatchNorm" in kind for kind in kinds(quantized))
    assert "quantized" in quantized.code or "Conv2d" in kinds(quantized)
    expected = model(X)
    assert (quantized(X) - expected).abs().mean() < 0.1 * expected.std()


def test_eager_mode() -> None:
    model = bn.accelerate(trained(plain), X).model
    groups = [["0", "1", "2"], ["3", "4"]]
    with pytest.raises(AssertionError, match="did not find fuser method for"):
        quantization.fuse_modules(copy.deepcopy(model).eval(), groups)
    unfused = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    unfused.qconfig = quantization.get_default_qconfig("fbgemm")
    prepared = quantization.prepare(unfused)
    prepared(X)
    with pytest.raises(
        TypeError, match=r"got torch.quint8. Call batchnorm.convert\(model, torch.nn\) before you quant"
    ):
        quantization.convert(prepared)(X)
    converted = bn.convert(model, torch.nn).model
    fused = quantization.fuse_modules(copy.deepcopy(converted).eval(), groups)
    assert_close(fused(X), model.eval()(X))
    assert not any("BatchNorm" in kind for kind in kinds(fused))
    converted.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    prepared = quantization.prepare_qat(quantization.fuse_modules_qat(converted, groups))
    assert {"ConvBnReLU2d", "ConvBn2d"} <= kinds(prepared)
    prepared(X)


@pytest.mark.parametrize(("make", "training"), [(networks.ResNet, True), (plain, False)])
def test_an_exported_graph_has_the_operators_that_pt2e_knows(make: Callable[[], nn.Module], training: bool) -> None:
    def operators(model: nn.Module) -> list[str]:
        graph = torch.export.export(model.train(training), (X,)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    model = trained(make)
    expected = operators(model)
    assert any("batch_norm" in operator for operator in expected)
    assert operators(bn.convert(model, bn.nn).model) == expected
    known = {name.replace("_.", ".") for name in expected}  # an activation may be in place in one of them
    assert {name.replace("_.", ".") for name in operators(bn.accelerate(model, X).model)} == known
