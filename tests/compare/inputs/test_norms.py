from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.compare import ComparisonError, register
from batchnorm.compare.inputs import norms
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d


def test_batch_is_our_own_layer_in_each_rank():
    norm = norms.parse("batch")
    layers = [norm(8), norm(8, dims=2), norm(8, dims=3)]
    assert [type(layer) for layer in layers] == [BatchNorm1d, BatchNorm2d, BatchNorm3d]
    assert norm.made == layers
    assert norm.replaces_bias


def test_none_does_nothing():
    norm = norms.parse("none")
    assert isinstance(norm(8), nn.Identity)
    assert not norm.replaces_bias


def test_options_reach_the_layer():
    layer = norms.parse("batch:eps=0.5,momentum=None")(4)
    assert (layer.eps, layer.momentum) == (0.5, None)
    assert norms.parse("batch:0.25")(4).eps == 0.25


@pytest.mark.parametrize(
    ("given", "specs"),
    [
        ("none,batch", ["none", "batch"]),
        (["none", "batch"], ["none", "batch"]),
        (["none, batch"], ["none", "batch"]),
        (["batch:eps=1e-3,momentum=0.5,none"], ["batch:eps=1e-3,momentum=0.5", "none"]),
        (["none", "batch:eps=1e-3", "batch:eps=1e-2"], ["none", "batch:eps=1e-3", "batch:eps=1e-2"]),
    ],
)
def test_several_norms_are_separated(given, specs):
    assert [norm.spec for norm in norms.parse_all(given)] == specs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("btach", "norms must be among none, as-is, batch.*, got 'btach'. Did you mean batch?"),
        ("zzz", "got 'zzz'. Choose from these"),
        ("", "norms must name at least one"),
        (["none", "none"], "norms must all differ, got 'none' twice"),
        ("batch:speed=3", "options of norm 'batch:speed=3' must be valid for its layer"),
        ("ghost:0", "options of norm 'ghost:0' must be valid for its layer"),
        ("renorm:rmax=0.5", "options of norm 'renorm:rmax=0.5' must be valid for its layer"),
        ("decorrelated:8,rmax=3", "options of norm 'decorrelated:8,rmax=3' must be valid for its layer"),
        ("group:0", "the number of groups must be a positive integer, got 0"),
        ("group:many", "the number of groups must be a positive integer, got 'many'. Write for example group:8"),
        ("layer:8", "options of norm 'layer:8' must be valid"),
        ("domain", "norms must be among .* got 'domain'"),
        ("batch:eps=-1", "options of norm 'batch:eps=-1' must be valid for its layer"),
    ],
)
def test_unusable_norms_are_refused_with_the_reason(given, message):
    with pytest.raises(ComparisonError, match=message):
        norms.parse_all(given)


def test_a_layer_joins_by_one_line(monkeypatch):
    monkeypatch.setattr(norms, "_REGISTRY", dict(norms._REGISTRY))
    register("mine", lambda c, dims, groups=2: nn.GroupNorm(groups, c), title="my norm", replaces_bias=False)
    assert "mine" in norms.names()
    assert norms.parse("mine:4")(8).num_groups == 4
    with pytest.raises(ValueError, match="a norm needs a free name"):
        register("mine", nn.Identity, title="again", replaces_bias=False)


@pytest.mark.parametrize(
    ("spec", "attributes"),
    [
        ("renorm", {"rmax": 3.0, "dmax": 5.0}),
        ("renorm:2,dmax=1", {"rmax": 2, "dmax": 1}),
        ("ghost:16", {"ghost_size": 16}),
        ("ghost:ghost_size=8,momentum=0.5", {"ghost_size": 8, "momentum": 0.5}),
        ("sync:eps=1e-3", {"eps": 1e-3}),
        ("decorrelated:4,iterations=3", {"group_size": 4, "iterations": 3}),
        ("group", {"num_groups": 32}),
        ("group:8,eps=1e-3", {"num_groups": 8, "eps": 1e-3}),
        ("layer", {"num_groups": 1}),
        ("instance", {"affine": True}),
        ("instance:affine=False", {"affine": False}),
    ],
)
def test_each_norm_normalizes_and_trains_in_each_rank(spec, attributes):
    norm = norms.parse(spec)
    for dims in (1, 2, 3):
        layer = norm(32, dims)
        assert {name: getattr(layer, name) for name in attributes} == attributes
        x = torch.randn(16, 32, *(4, 3, 2)[:dims], requires_grad=True)
        y = layer(x)
        assert abs(y.mean().item()) < 0.05
        assert 0.5 < y.std().item() < 1.1
        y.square().mul(x).sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *layer.parameters()))
    assert len(norm.made) == 3


@pytest.mark.parametrize("name", norms.names())
def test_a_bias_is_dropped_just_where_it_does_nothing(name):
    layer, x = norms.parse(name)(64, dims=2), torch.randn(8, 64, 4, 4)
    if name == "renorm":  # its correction follows the running mean, which follows the bias
        layer.reset_parameters()
        layer.running_mean += x.mean((0, 2, 3))
    before = layer(x)
    shift = torch.linspace(-1, 1, 64)
    if name == "renorm":
        layer.reset_parameters()
        layer.running_mean += x.mean((0, 2, 3)) + shift
    same = torch.allclose(layer(x + shift[:, None, None]), before, atol=1e-4)
    assert same == norms.parse(name).replaces_bias


def test_inputs_that_cannot_be_normalized_raise_an_error():
    with pytest.raises(ValueError, match=r"instance normalization expects x .* with positions .*, got \[32, 32\]"):
        norms.parse("instance")(32)(torch.randn(32, 32))
    with pytest.raises(
        ComparisonError, match=r"which raised: at most 2 without a name \(rmax, dmax\). Write renorm alone"
    ):
        norms.parse("renorm:3,5,7")


@pytest.mark.parametrize(
    ("groups", "channels", "nearest"),
    [
        (8, 100, "group:5 or group:10"),
        (32, 48, "group:24"),
        (3, 7, "group:1"),
        (5, 6, "group:3"),  # groups of a single channel would leave nothing of [N, C]
        (7, 8, "group:4"),
    ],
)
def test_groups_that_do_not_divide_the_channels_propose_the_nearest_that_do(groups, channels, nearest):
    with pytest.raises(ValueError, match=rf"divides the {channels} channels, got {groups}\. Write {nearest}$"):
        norms.parse(f"group:{groups}")(channels, dims=2)
    for proposed in nearest.split(" or "):
        assert norms.parse(proposed)(channels)(torch.randn(4, channels, 2)).isfinite().all()


@pytest.mark.parametrize(("spec", "channels"), [("group", 32), ("group:8", 8), ("layer", 1)])
def test_groups_of_one_value_are_refused(spec: str, channels: int) -> None:
    for shape in ((4, channels), (4, channels, 1), (4, channels, 1, 1)):
        layer = norms.parse(spec)(channels, dims=max(len(shape) - 2, 1))
        with pytest.raises(ValueError, match=r"more than one value per group, got \[4, "):
            layer(torch.randn(shape))
        assert layer(torch.randn(*shape[:2], 5)).shape == (*shape[:2], 5)


def test_unknown_rank_is_refused():
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, got 4"):
        norms.parse("batch")(8, dims=4)


def test_the_placement_decides_the_order():
    x = torch.randn(32, 8)
    for placement, order in (("before", ["norm", "activation"]), ("after", ["activation", "norm"])):
        norm = norms.parse("batch", placement)
        layer = norm.activated(8, nn.Sigmoid)
        assert [name for name, _ in layer.named_children()] == order
        assert norm.made == [layer.norm]
        assert norm.replaces_bias == (placement == "before")
        assert (abs(layer(x).mean().item()) < 1e-6) == (placement == "after")
    assert isinstance(norms.parse("batch").activated(8, dims=2).norm, BatchNorm2d)


def test_an_unknown_placement_is_refused():
    with pytest.raises(ComparisonError, match=r"placement must be among before, after, got 'behind'"):
        norms.parse("batch", "behind")


def test_options_without_a_name_get_it():
    assert norms.parse("ghost:16").options == {"ghost_size": 16}
    assert norms.parse("renorm:2,dmax=1").options == {"rmax": 2, "dmax": 1}
