"""Channels whose γ is zero are removed without a change, and small ones as if masked."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from batchnorm import walk
from batchnorm.models.gate import TOLERANCE, relative
from batchnorm.surgery.prune import prune_channels
from tests.surgery.prune.models import NETS, error, made, slimmed, state


def removed(model: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """Return for each layer which channels are missing, by their means, which are all different."""
    before, after = ({f.path: f.module for f in walk.norm_layers(m)} for m in (model, pruned))
    return {path: ~torch.isin(before[path].bias, after[path].bias) for path in before}


# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "negative"),
    [*((name, True) for name in NETS), *((name, False) for name in NETS if name not in ("transformers", "unet", "3d"))],
)
def test_removing_channels_with_zero_gamma_changes_nothing(name: str, negative: bool) -> None:
    model, x = made(name, negative=negative)
    before, values = state(model), {key: value.clone() for key, value in model.state_dict().items()}
    pruned, report = prune_channels(model, x)
    assert state(model) == before and all(torch.equal(values[key], v) for key, v in model.state_dict().items())
    assert report.changed and report.channels < report.channels_before
    assert error(model, pruned, x) < TOLERANCE["float64"]
    assert error(model, pruned, torch.randn_like(x)) < TOLERANCE["float64"]
    assert report.difference < TOLERANCE["float64"]
    assert type(pruned) is type(model) and pruned.training == model.training
    assert report.parameters == sum(p.numel() for p in pruned.parameters()) < report.parameters_before
    for path, which in removed(model, pruned).items():
        layer = pruned.get_submodule(path)
        sizes = {len(t) for t in (*layer.parameters(), *layer.buffers()) if t.dim()}
        assert sizes == {layer.num_features} == {int((~which).sum())}
    copy.deepcopy(pruned).load_state_dict(pruned.state_dict())


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "vgg", "3d"])
def test_the_pruned_network_trains_as_the_original(name: str) -> None:
    model, x = made(name)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    pruned, report = prune_channels(model, x)
    assert report.changed
    assert error(model, pruned, x, training=True) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_memory_format_and_trained_parameters_are_kept(dtype: torch.dtype) -> None:
    model, x = made("resnet")
    model = model.to(dtype).to(memory_format=torch.channels_last)
    model.layer1[1].conv2.weight.requires_grad_(False)
    pruned, report = prune_channels(model, x.to(dtype))
    assert report.changed
    weight = pruned.layer1[1].conv2.weight
    assert weight.dtype == dtype and not weight.requires_grad and weight.shape[1] < 8
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_constant_goes_into_the_bias_or_the_running_mean() -> None:
    for bias in (True, False):
        for norm in (True, False):
            after = nn.BatchNorm2d(5) if norm else nn.Identity()
            model = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 5, 3, bias=bias), after
            )
            slimmed(model.double())
            pruned, report = prune_channels(model, x := torch.randn(2, 3, 9, 9).double())
            assert error(model, pruned, x) < TOLERANCE["float64"]
            assert (pruned[3].bias is not None) == (bias or not norm)
            assert any("new biases" in note for note in report.notes) == (not bias and not norm)
            if norm:
                assert torch.equal(pruned[4].running_mean, model[4].running_mean) == bias


def test_channels_that_are_added_are_removed_together() -> None:
    model, x = made("resnet", zeros=0.0)
    layers = [model.bn1, model.layer1[0].bn2, model.layer1[1].bn2]
    with torch.no_grad():
        for layer in layers:
            layer.weight[2], layer.bias[2] = 0, -1
        layers[0].weight[5] = layers[1].weight[5] = 0
    pruned, report = prune_channels(model, x)
    assert next(which.nonzero().tolist() for which in removed(model, pruned).values()) == [[2]]
    assert {change.path for change in report.changed} == {"bn1", "layer1.0.bn2", "layer1.1.bn2"}
    assert pruned.layer2[0].downsample[0].in_channels == pruned.layer1[0].conv1.in_channels == 7
    assert all("1 with small γ stay: their values vary" in change.reason for change in report.changed[:2])
    assert not report.changed[2].reason
    assert error(model, pruned, x) < TOLERANCE["float64"]


def test_each_layer_keeps_a_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    slimmed(model.double(), zeros=1.1)
    pruned, report = prune_channels(model, x := torch.randn(2, 3, 7, 7).double())
    assert pruned[1].num_features == pruned[0].out_channels == pruned[3].in_channels == 1
    assert error(model, pruned, x) < TOLERANCE["float64"]
    assert "keeps at least one" in report.changed[0].reason


# Small γ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vgg", "excited", "densenet"])
def test_removing_small_gammas_equals_masking_them(name: str) -> None:
    model, x = made(name, zeros=0.0)
    with torch.no_grad():
        for found in walk.norm_layers(model):
            if name != "vgg":
                found.module.bias.abs_().neg_()
    pruned, report = prune_channels(model, x, threshold=0.8)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for path, which in removed(model, pruned).items():
            weight = masked.get_submodule(path).weight
            weight[which & (weight <= 0.8)] = 0
    assert report.changed and report.difference > 1e-3
    assert math.isclose(error(model, pruned, x), report.difference, rel_tol=0.9)
    assert error(masked, pruned, x) < 1e-11


def test_with_zero_padding_the_constant_is_right_inside() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1),
    )  # fmt: skip
    slimmed(model.double())
    with torch.no_grad():
        model[4].weight.fill_(1)
    x = torch.randn(2, 3, 14, 14).double()
    _, report = prune_channels(model, x)
    assert not report.changed and "vary at conv2d in 5" in report.left[0].reason
    pruned, report = prune_channels(model, x, threshold=0.0)
    assert report.changed and report.difference > 1e-3
    a, b = model.eval()(x), pruned.eval()(x)
    assert relative(b[..., 2:-2, 2:-2], a[..., 2:-2, 2:-2]) < 1e-12
    assert report.difference == pytest.approx(error(model, pruned, x), rel=0.9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_share_removes_the_smallest_of_all_layers(share: float) -> None:
    model, x = made("vgg", zeros=0.0)
    pruned, report = prune_channels(model, x, share=share)
    gone = removed(model, pruned)
    assert sum(int(which.sum()) for which in gone.values()) == round(share * (8 + 12 + 10 - 3))
    gammas = {path: model.get_submodule(path).weight.detach() for path in gone}
    smallest_kept = min(float(gammas[path][~which].min()) for path, which in gone.items() if not which.all())
    if share < 0.9:  # otherwise some layers keep their last channel
        assert max(float(gammas[path][which].max()) for path, which in gone.items() if which.any()) < smallest_kept
    assert report.channels_before - report.channels == round(share * 27)


def test_share_works_if_all_gammas_are_equal() -> None:
    torch.manual_seed(0)
    model, x = NETS["mobilenet"]()
    _, report = prune_channels(model, x, share=0.5)
    assert 0.3 < 1 - report.channels / report.channels_before < 0.7


def test_only_chooses_the_layers() -> None:
    model, x = made("resnet")
    _, report = prune_channels(model, x, only="layer2.*")
    assert {change.path for change in report.changed} == {"layer2.0.bn1", "layer2.1.bn1"}
    assert all(change.path.startswith("layer2.") for change in report.left)
