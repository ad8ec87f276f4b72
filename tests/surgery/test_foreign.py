"""Every verb and the doctor know the frozen layers of other libraries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.doctor.pytorch.inspection import inspect_layers
from tests.foreign_layers import FOREIGN, Detr, drawn

X = torch.linspace(-1, 2, 4 * 3 * 8 * 8).sin().reshape(4, 3, 8, 8)
ALL = pytest.mark.parametrize("name", FOREIGN)
WITH_EPS = pytest.mark.parametrize("name", [name for name in FOREIGN if name != "maskrcnn"])


class Branching(nn.Sequential):
    """fx cannot trace it, so folding goes through export."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if input.shape[1] == 3 else input[:, :3])


def network(name: str, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    return kind(nn.Conv2d(3, 4, 3), drawn(FOREIGN[name](4)), nn.ReLU(), nn.Conv2d(4, 2, 1)).train()


def vectors(layer: nn.Module) -> dict[str, Tensor]:
    return {name: getattr(layer, name) for name in ("weight", "bias", "running_mean", "running_var")}


@ALL
@pytest.mark.parametrize("kind", [nn.Sequential, Branching])
def test_fold(name: str, kind: type[nn.Sequential]) -> None:
    model = network(name, kind).eval()
    folded, report = bn.fold(model, X)
    assert (report.before, report.remaining) == (1, 0)
    assert report.how == ("fx" if kind is nn.Sequential else "export")
    assert [change.path for change in report.changed] == ["1"]
    assert_close(folded(X), model(X))
    assert not bn.walk.norm_layers(folded)


@WITH_EPS
def test_unfreeze_makes_a_layer_that_trains(name: str) -> None:
    model = network(name)
    before = model[1]
    model, report = bn.unfreeze(model, inplace=True)
    assert str(report.changed[0].now) == "BatchNorm2d(4)"
    assert report.changed[0].was.endswith("(4)")
    layer: Any = model[1]
    assert type(layer) is bn.BatchNorm2d
    assert layer.training
    for key, value in vectors(before).items():
        assert_close(getattr(layer, key).detach(), value)
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad
    assert_close(model.eval()(X), network(name)(X))
    mean = layer.running_mean.clone()
    model.train()(X).sum().backward()
    assert layer.weight.grad is not None
    assert not torch.equal(layer.running_mean, mean)
    assert type(bn.freeze(model).model[1]) is bn.FrozenBatchNorm2d


@ALL
def test_convert_to_this_librarys_frozen_layer(name: str) -> None:
    model = network(name)
    called: list[object] = []
    handle = model[1].register_forward_hook(lambda *_: called.append(1))
    converted = bn.convert(model, bn.nn).model
    assert type(converted[1]) is bn.FrozenBatchNorm2d
    assert not any(p.requires_grad for p in converted[1].parameters())
    assert_close(converted(X), model(X))
    assert len(called) == 2
    handle.remove()
    state = network(name).state_dict()
    assert not converted.load_state_dict(state).missing_keys  # a checkpoint of the other library still loads
    inplace = bn.convert(model, bn.nn, inplace=True).model
    assert inplace is model
    assert type(model[1]) is bn.FrozenBatchNorm2d


@WITH_EPS
@pytest.mark.parametrize("to", [torch.nn, bn.BatchRenorm, "SyncBatchNorm", nn.GroupNorm, nn.Identity])
def test_convert_to_other_classes(name: str, to: Any) -> None:
    model = network(name)
    converted, report = bn.convert(model, to)
    assert [change.path for change in report.changed] == ["1"]
    if isinstance(converted[1], nn.modules.batchnorm._BatchNorm):
        assert_close(converted.eval()(X), model(X))
    assert converted.train()(X).shape == model(X).shape


@ALL
def test_functions_that_leave_it_give_the_reason(name: str) -> None:
    model = network(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for verb, path, reason in (
        (lambda: bn.freeze(model, inplace=True), "1", "it is frozen already"),
        (lambda: bn.accelerate(model, X, inplace=True), "1", "is another library's frozen layer; batchnorm.convert("),
        (lambda: bn.drop_redundant_bias(model, inplace=True), "0", "the layer after it is frozen, so nothing"),
    ):
        report = verb().report
        assert not report.changed
        assert [change.path for change in report.left] == [path]
        assert reason in report.left[0].reason
    with pytest.raises(ValueError, match=r"1 frozen\)|1: frozen|frozen"):
        bn.recalibrate(model, [X, X + 1])
    named = bn.recalibrate(model, [X, X + 1], only="1").model
    assert not torch.equal(named[1].running_mean, model[1].running_mean)
    assert type(model[1]) is FOREIGN[name]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@ALL
def test_prune(name: str) -> None:
    model = network(name).eval()
    model[1].weight[:2] = 0
    pruned, report = bn.prune_channels(model, X)
    assert (report.channels_before, report.channels) == (4, 2)
    assert [change.now for change in report.changed] == [f"{FOREIGN[name].__name__}(2)"]
    assert_close(pruned(X), model(X))
    assert str(report).count("create the optimizer after pruning") == 1


def test_eps_0_is_refused_if_the_layer_would_use_batches() -> None:
    with pytest.raises(ValueError, match=r"unfreeze cannot change any layer; 1: BatchNorm2d expects eps > 0, got 0"):
        bn.unfreeze(network("maskrcnn"))


@ALL
def test_the_doctor_and_the_other_helpers(name: str) -> None:
    model = network(name)
    (facts,) = inspect_layers(model, X)
    assert (facts.kind, facts.channels, facts.after, facts.foldable) == (FOREIGN[name].__name__, 4, "0 (conv2d)", True)
    assert facts.eps == (0.0 if name == "maskrcnn" else 1e-5)
    assert len(bn.parameter_groups(model, 0.1)) == 1
    mixed = nn.Sequential(network(name), nn.BatchNorm2d(2)).train()
    with bn.nn.microbatch_momentum(mixed, 4):
        assert mixed[1].momentum < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bn.watch(mixed, every=1):
            for _ in range(3):
                mixed(X).sum().backward()
    found = bn.diagnose(mixed, [X, X + 1, 2 * X])
    assert [layer.path for layer in found.layers] == ["0.1", "1"]
    codes = {finding.code for finding in found.findings if "0.1" in finding.paths}
    assert not codes & {"BN107", "BN110", "BN201", "BN204", "BN209", "BN212", "BN216"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_detr_of_the_transformers_library() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=8,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
        decoder_ffn_dim=8, num_queries=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DetrModel(config).eval()
    layers = bn.walk.norm_layers(model)
    for i, found in enumerate(layers):
        drawn(found.module, i)
    images = torch.randn(2, 3, 32, 32)
    before = model(images).last_hidden_state
    folded, report = bn.fold(model, images)
    assert (report.before, report.remaining) == (len(layers), 0)
    unfrozen, report = bn.unfreeze(model)
    assert len(report.changed) == len(layers) > 4
    assert_close(folded(images).last_hidden_state, before, rtol=1e-4, atol=1e-5)
    assert_close(unfrozen.eval()(images).last_hidden_state, before, rtol=1e-4, atol=1e-5)


def test_a_shared_layer_and_a_model_that_is_one() -> None:
    layer = drawn(Detr(3))
    model = nn.ModuleDict({"a": layer, "b": layer})
    model, report = bn.convert(model, bn.nn)
    assert model["a"] is model["b"]
    assert report.changed[0].reason == "also at b"
    assert type(bn.unfreeze(layer).model) is bn.BatchNorm2d
    assert_close(bn.fold(nn.Sequential(layer, nn.Conv2d(3, 2, 1)).eval(), X).model(X).shape, torch.Size([4, 2, 8, 8]))
