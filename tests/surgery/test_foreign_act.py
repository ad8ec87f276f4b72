"""Every function knows the layers of other libraries that apply modules to their result, such as timm's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.foreign import applies_followers, foreign_eps
from batchnorm.nn.followed import followers
from tests.foreign_layers import TimmAct, TimmFrozenAct, TimmSyncAct, drawn

X = torch.linspace(-1, 2, 4 * 3 * 8 * 8, dtype=torch.float64).sin().reshape(4, 3, 8, 8)
UNKNOWN = nn.GELU(approximate="tanh")
ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "silu": nn.SiLU(), "none": nn.Identity(), "unknown": UNKNOWN}
ALL = pytest.mark.parametrize("act", ACTIVATIONS)


def network(act: str = "silu", drop: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layer = drawn(TimmAct(4, copy.deepcopy(ACTIVATIONS[act]), drop))
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 2, 1)).double().train()


def results(model: nn.Module, x: Tensor = X) -> dict[str, Tensor]:
    """The output in both modes, the gradients, and the state after a step in training, on a copy."""
    model = copy.deepcopy(model)
    found = {"evaluation": model.eval()(x).detach()}
    torch.manual_seed(1)
    found["training"] = y = model.train()(x)
    y.square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "training": y.detach(), **gradients, **model.state_dict()}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    found, expected = results(model), results(other)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert_close(tensor, expected[name], rtol=1e-10, atol=1e-10, msg=name)


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# Recognition ---------------------------------------------------------------------------------------------------------


class WrongOrder(TimmAct):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(nn.BatchNorm2d.forward(self, x)))


class Doubles(TimmAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class DoublesInTraining(TimmAct):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.training else 1)


class KeepsStatistics(TimmAct):
    def forward(self, x: Tensor) -> Tensor:
        kept = self.running_mean.clone()
        y = super().forward(x)
        self.running_mean.copy_(kept)
        return y


class AlsoHolds(TimmAct):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.gate = nn.Identity()


def test_layers_are_recognized_by_what_they_compute() -> None:
    assert (
        applies_followers(TimmAct(4))
        and applies_followers(TimmAct(4, nn.PReLU()))
        and applies_followers(TimmSyncAct(4))
    )
    assert foreign_eps(TimmFrozenAct(4)) == 1e-3
    for other in (
        WrongOrder,
        Doubles,
        DoublesInTraining,
        KeepsStatistics,
        AlsoHolds,
        nn.BatchNorm2d,
        bn.BatchNormAct2d,
    ):
        assert not applies_followers(other(4)), other
    layer = TimmAct(4)
    before = copy.deepcopy(layer.state_dict())
    applies_followers(layer)
    assert_close(layer.state_dict(), before)


# accelerate ----------------------------------------------------------------------------------------------------------


@ALL
def test_accelerate_keeps_class_results_and_modules(act: str) -> None:
    model = network(act)
    fast, report = bn.accelerate(model, X)
    assert [change.path for change in report.changed] == ["1"] and not report.left
    fused = {"relu": " + relu", "silu": " + silu", "none": "", "unknown": ""}
    assert report.changed[0].now == "TimmAct(4)" + fused[act]
    assert report.difference is not None and report.difference < 1e-12
    assert isinstance(fast[1], TimmAct) and type(fast[1]).__name__ == "TimmAct"
    for same in (fast, pickle.loads(pickle.dumps(fast)), bn.accelerate(fast).model):
        assert_same(same, model)
        assert kinds(same) == kinds(fast)
    assert kinds(bn.convert(fast, to=nn).model) == kinds(model)
    assert_same(bn.convert(fast, to=nn).model, model)


def test_accelerate_inplace_keeps_the_object() -> None:
    model = network()
    layer = model[1]
    bn.accelerate(model, inplace=True)
    assert model[1] is layer and type(layer) is not TimmAct
    assert kinds(bn.convert(model, to=nn, inplace=True).model) == kinds(network())


def test_the_modules_of_an_accelerated_layer_stay_in_effect() -> None:
    fast: Any = bn.accelerate(network()).model
    fast[1].act = nn.Tanh()
    expected = network()
    expected[1].act = nn.Tanh()
    assert_same(fast, expected)
    seen: list[Tensor] = []
    handle = fast[1].act.register_forward_hook(lambda module, args, y: seen.append(y))
    assert_same(fast, expected)
    handle.remove()
    assert seen


def test_a_dropout_that_drops_is_applied() -> None:
    model = network("relu", nn.Dropout(0.5))
    assert_same(bn.accelerate(model).model, model)
    assert_same(bn.convert(model, to=bn.nn).model, model)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = drawn(TimmAct(3, nn.Identity()))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x) + x)


def test_operations_after_a_layer_without_activation_are_fused() -> None:
    model = Residual().double()
    fast, report = bn.accelerate(model, X)
    assert report.changed[0].now == "TimmAct(3) + residual + relu" and report.changed[0].reason == "in the model"
    assert_same(fast, model)
    assert kinds(bn.convert(fast, to=nn).model) == kinds(model)


# convert, freeze -----------------------------------------------------------------------------------------------------


@ALL
def test_convert_carries_the_modules_over_and_back(act: str) -> None:
    model = network(act)
    ours, report = bn.convert(model, to=bn.nn)
    name = type(ACTIVATIONS[act]).__name__
    assert report.changed[0].now == "BatchNormAct2d(4)" + f" + {name}" * (act != "none")
    assert isinstance(ours[1], bn.BatchNormAct2d) and type(ours[1].act) is type(ACTIVATIONS[act])
    assert_same(ours, model)
    assert_same(pickle.loads(pickle.dumps(ours)), model)
    assert bn.convert(ours, to=bn.nn).report.left[0].reason == "it is one already"
    back = bn.convert(bn.accelerate(ours).model, to=nn).model
    assert kinds(back) == kinds(model)
    assert_same(back, model)
    assert bn.convert(model, to=nn).report.left[0].reason.startswith("it is one already")


@pytest.mark.parametrize("to", ["BatchRenorm", "GroupNorm", "SyncBatchNorm", "Identity"])
def test_other_normalizations_are_followed_by_the_modules(to: str) -> None:
    ours = bn.convert(network("unknown"), to=to).model
    layer: Any = ours[1]
    assert type(layer).__name__.startswith(to) and list(followers(layer)) == ["drop", "act"]
    y = ours[0](X)
    plain = getattr(bn.nn, type(layer).__name__, None) or getattr(nn, to)
    assert_close(layer.eval()(y), UNKNOWN(plain.forward(layer.eval(), y)))


def test_an_accelerated_layer_is_converted_and_restored() -> None:
    model = network()
    fast = bn.accelerate(model).model
    frozen = bn.freeze(fast).model
    assert type(frozen[1]).__name__ == "FrozenBatchNormAct2d"
    assert kinds(bn.unfreeze(frozen).model) == kinds(fast)
    assert kinds(bn.convert(bn.convert(fast, to=bn.nn).model, to=nn).model) == kinds(model)


@ALL
def test_freeze_normalizes_by_the_running_statistics_and_unfreeze_restores(act: str) -> None:
    model = network(act)
    frozen, report = bn.freeze(model)
    assert len(report.changed) == 1 and isinstance(frozen[1], bn.FrozenBatchNormAct2d)
    expected = copy.deepcopy(model).eval()
    assert_close(frozen.train()(X), expected(X))
    assert not frozen[1].weight.requires_grad
    frozen[1].act = nn.Tanh()
    again: Any = bn.unfreeze(frozen).model
    assert kinds(again[1])[:1] == [TimmAct] and type(again[1].act) is nn.Tanh and again[1].weight.requires_grad


def test_the_modules_of_a_foreign_frozen_layer_are_kept() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), drawn(TimmFrozenAct(4, nn.Tanh())), nn.Conv2d(4, 2, 1)).double()
    ours: Any = bn.convert(model, to=bn.nn).model
    trains: Any = bn.unfreeze(model).model
    assert type(ours[1]).__name__ == "FrozenBatchNormAct2d" and type(trains[1]).__name__ == "BatchNormAct2d"
    for each in (ours.train(), trains.eval(), bn.fold(model, X).model):
        assert_close(each(X), model(X))
    assert bn.fold(model, X).report.remaining == 0


def test_synchronized_layers_become_others() -> None:
    model: Any = nn.Sequential(drawn(TimmSyncAct(3))).double()
    assert bn.accelerate(model).report.left[0].reason.startswith("synchronizes processes")
    ours: Any = bn.convert(model, to="BatchNorm2d").model
    assert type(ours[0].act) is nn.SiLU
    assert_close(ours.eval()(X), model.eval()(X))
    assert kinds(bn.convert(ours, to=nn).model) == kinds(model)


# Other functions -----------------------------------------------------------------------------------------------------


def test_a_bias_before_the_layer_is_redundant() -> None:
    model = network()
    changed, report = bn.drop_redundant_bias(model)
    assert [change.path for change in report.changed] == ["0"] and changed[0].bias is None
    assert_close(changed(X), model(X))
    codes = {finding.code for finding in bn.diagnose(model.eval(), [X]).findings}
    assert "BN110" in codes


def test_statistics_channels_and_folds_are_found() -> None:
    model: Any = network().eval()
    recalibrated: Any = bn.recalibrate(model, [X]).model
    y = model[0](X)
    assert_close(recalibrated[1].running_mean, y.mean((0, 2, 3)))
    for each in (model, bn.convert(model, to=bn.nn).model, bn.accelerate(model).model):
        folded, report = bn.fold(each, X)
        assert report.remaining == 0
        assert_close(folded(X), model(X))
    with torch.no_grad():
        model[1].weight[:2] = 0.0
        model[1].bias[:2] = 0.0
    pruned, report = bn.prune_channels(model, X)
    assert report.channels_before - report.channels == 2
    assert_close(pruned(X), model(X))
