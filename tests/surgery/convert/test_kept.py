"""`convert` keeps shared layers, tensors, modes, hooks and parametrizations, and leaves some layers as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from batchnorm.nn import act, batch, domain, frozen, ghost, renorm
from batchnorm.surgery import convert
from tests.surgery.convert.family import CALLED_PLAINLY, FAMILY, SHAPES, trained


def test_a_shared_layer_stays_shared() -> None:
    shared = trained()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": trained()})
    result = convert(model, to=batch.BatchNorm, inplace=True)
    assert result.model is model
    assert model["a"][0] is model["b"]
    assert [(c.path, c.reason) for c in result.report.changed] == [("a.0", "also at b"), ("c", "")]
    assert model["b"].weight is shared.weight
    tied = nn.Sequential(trained(), trained())
    tied[1].weight = tied[0].weight
    converted = convert(tied, to=batch.BatchNorm).model
    assert converted[0].weight is converted[1].weight


def test_an_optimizer_and_others_go_on_with_the_same_tensors() -> None:
    model = nn.Sequential(trained())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for to in (batch.BatchNorm, renorm.BatchRenorm, torch.nn.BatchNorm2d, "GroupNorm"):
        convert(model, to=to, inplace=True)
        for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            assert tensor is tensors[name]
    before = model[0].weight.detach().clone()
    model(torch.randn(SHAPES["2d"])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_modes_flags_dtypes_and_devices_are_kept() -> None:
    model = nn.Sequential(trained(), trained(), trained(), trained(device="meta"))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[2].half()
    model[2].running_mean = model[2].running_mean.float()
    model[2].running_var = model[2].running_var.float()
    model[0].track_running_stats = False
    for name in (*CALLED_PLAINLY, "DomainBatchNorm"):
        kind, options = FAMILY[name]
        new = convert(model, to=kind, **options).model
        assert [m.training for m in new] == [True, False, True, True]
        assert [(m.weight.requires_grad, m.bias.requires_grad) for m in new] == [(False, True)] + [(True, True)] * 3
        assert (new[2].weight.dtype, new[2].running_var.dtype) == (torch.float16, torch.float32)
        assert new[3].weight.is_meta and new[3].running_mean.is_meta
        assert [m.track_running_stats for m in new] == [False, True, True, True]
        if name != "DomainBatchNorm":
            back = convert(new, to=torch.nn).model
            assert back[0].track_running_stats is False
            assert back[1].training is False
            assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in model.parameters()]
            assert vars(back[0]).keys() == vars(model[0]).keys()


def test_the_switch_of_running_statistics_is_kept() -> None:
    model = nn.Sequential(batch.BatchNorm2d(4, on_nonfinite="skip"))
    model[0].update_running_stats = False
    new = convert(model, to=ghost.GhostBatchNorm).model[0]
    assert new.update_running_stats is False
    assert new.on_nonfinite == "skip"


def test_hooks_and_their_handles_are_kept() -> None:
    model, seen = nn.Sequential(trained()), []
    layer = model[0]
    handles = [
        layer.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: seen.append("state")),
        layer.register_load_state_dict_pre_hook(lambda m, *_: seen.append(type(m).__name__)),
    ]
    for to in (ghost.GhostBatchNorm, torch.nn, nn.GroupNorm):
        convert(model, to=to, inplace=True)
        del layer
        layer = model[0]
        seen.clear()
        model(torch.randn(SHAPES["2d"], requires_grad=True)).sum().backward()
        layer.load_state_dict(layer.state_dict())
        assert seen == ["pre", "forward", "backward", "state", type(layer).__name__]
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(SHAPES["2d"], requires_grad=True)).sum().backward()
    layer.load_state_dict(layer.state_dict())
    assert seen == []


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("make", [Doubled, nn.Softplus], ids=["invertible", "not_invertible"])
def test_parametrizations_are_kept(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(trained())
    parametrize.register_parametrization(model[0], "weight", make())
    original = model[0].parametrizations.weight.original
    original.requires_grad_(False)
    x = torch.randn(SHAPES["2d"])
    expected, state = model(x), model.state_dict().keys()
    new = convert(model, to=ghost.GhostBatchNorm, ghost_size=6, inplace=True).model
    assert parametrize.type_before_parametrizations(new[0]) is ghost.GhostBatchNorm2d
    assert new[0].parametrizations.weight.original is original
    assert not original.requires_grad
    assert new.state_dict().keys() == state
    assert_close(new(x), expected)
    grouped = convert(new, to=nn.GroupNorm).model
    assert_close(grouped[0].weight, new[0].weight)
    frozen_layer = convert(new, to=frozen.FrozenBatchNorm).model[0]
    assert not frozen_layer.bias.requires_grad
    left = convert(new, to=domain.DomainBatchNorm, num_domains=2, affine_per_domain=True).report.left
    assert left[0].reason == "its weight is parametrized and would change its shape"
    back = convert(new, to=torch.nn, inplace=True).model
    assert parametrize.type_before_parametrizations(back[0]) is nn.BatchNorm2d
    assert back[0].parametrizations.weight.original is original
    assert_close(back(x), expected)


def test_a_parametrization_added_or_removed_later_is_respected() -> None:
    model = convert(nn.Sequential(trained()), to=batch.BatchNorm).model
    parametrize.register_parametrization(model[0], "weight", Doubled())
    back = convert(model, to=torch.nn).model
    assert parametrize.is_parametrized(back[0], "weight")
    assert_close(back[0].weight, model[0].weight)
    again = convert(back, to=batch.BatchNorm).model
    parametrize.remove_parametrizations(again[0], "weight")
    last = convert(again, to=torch.nn).model
    assert type(last[0]) is nn.BatchNorm2d
    assert_close(last[0].weight, model[0].weight)


class WithActivation(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class StaysInEvaluation(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> StaysInEvaluation:
        return super().train(False)


def with_parameter() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.gain = nn.Parameter(torch.ones(1))
    return layer


def with_forward() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("to", [ghost.GhostBatchNorm, torch.nn.SyncBatchNorm, nn.GroupNorm, nn.Identity])
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: WithActivation(4), "its class WithActivation has its own forward, which would be lost"),
        (lambda: StaysInEvaluation(4), "its class StaysInEvaluation has its own train, which would be lost"),
        (with_parameter, "it also holds gain, which would be lost"),
        (with_forward, "its forward was replaced on the instance, which would be lost"),
        (lambda: prune.random_unstructured(nn.BatchNorm2d(4), "weight", 0.5),
         "its weight is computed by a hook (weight_norm, pruning): make it permanent first"),
        (lambda: act.BatchNormAct2d(4, activation="silu"),
         "it also adds a residual and applies 'silu', which {} cannot"),
    ],
    ids=["activation", "train", "parameter", "forward", "pruned", "fused"],
)  # fmt: skip
def test_layers_whose_conversion_loses_something_are_left(layer: Callable[[], nn.Module], reason: str, to: Any) -> None:
    model = nn.Sequential(layer(), trained())
    old = model[0]
    report = convert(model, to=to, inplace=True).report
    assert model[0] is old
    name = "GhostBatchNorm2d" if to is ghost.GhostBatchNorm else to.__name__
    assert [(c.path, c.reason) for c in report.left] == [("0", reason.format(name))]
    assert [c.path for c in report.changed] == ["1"]
    assert "0" in str(report)
