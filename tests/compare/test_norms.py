from __future__ import annotations

import pytest
from torch import nn

from batchnorm.compare import ComparisonError, norms, register
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
def test_several_norms_are_told_apart(given, specs):
    assert [norm.spec for norm in norms.parse_all(given)] == specs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("btach", "norms must be among none, batch.*, got 'btach'. Did you mean batch?"),
        ("zzz", "got 'zzz'. Choose from these"),
        ("", "norms must name at least one"),
        (["none", "none"], "each norm must stand once in norms, got 'none' twice"),
        ("batch:speed=3", "options of norm 'batch:speed=3' must be ones that its layer takes"),
        ("batch:eps=-1", "options of norm 'batch:eps=-1' must be ones that its layer takes"),
    ],
)
def test_unusable_norms_are_refused_with_the_reason(given, message):
    with pytest.raises(ComparisonError, match=message):
        norms.parse_all(given)


def test_a_layer_joins_by_one_line(monkeypatch):
    monkeypatch.setattr(norms, "_REGISTRY", dict(norms._REGISTRY))
    register("group", lambda c, dims, groups=2: nn.GroupNorm(groups, c), title="group norm", replaces_bias=False)
    assert "group" in norms.names()
    assert norms.parse("group:4")(8).num_groups == 4
    with pytest.raises(ValueError, match="a norm needs a free name"):
        register("group", nn.Identity, title="again", replaces_bias=False)


def test_unknown_rank_is_refused():
    with pytest.raises(ValueError, match="dims must be 1, 2 or 3, got 4"):
        norms.parse("batch")(8, dims=4)
