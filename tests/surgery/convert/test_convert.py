"""`convert`: every class to every other, with the same parameters, statistics and results."""

from __future__ import annotations

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import batchnorm.nn
from batchnorm.models.report import Result
from batchnorm.nn import act, batch, conditional, domain, frozen, ghost, renorm, sync
from batchnorm.surgery import convert
from batchnorm.surgery.accelerate.accelerate import accelerate
from batchnorm.surgery.convert.ranks import rank_of
from tests.surgery.convert.family import CALLED_PLAINLY, FAMILY, SHAPES, trained

RANKS = ("1d", "2d", "3d")

MEANS_THE_SAME = (*CALLED_PLAINLY, "FrozenBatchNorm")


def call(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, domain.DomainBatchNorm | conditional.ConditionalBatchNorm):
        return layer(x, 1)
    return layer(x)


def only_layer(result: Result[Any]) -> nn.Module:
    (change,) = result.report.changed
    assert not result.report.left
    return result.model.get_submodule(change.path)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", FAMILY)
def test_each_family_class_takes_torchs_layer_and_gives_it_back(name: str, rank: str) -> None:
    kind, options = FAMILY[name]
    model = nn.Sequential(nn.Identity(), trained(rank, momentum=0.3, eps=1e-3))
    before = copy.deepcopy(model)
    result = convert(model, to=kind, **options)
    new = only_layer(result)
    assert str(dict(model.named_modules())) == str(dict(before.named_modules()))  # a copy was converted
    assert rank_of(new) == rank
    assert (new.momentum, new.eps) == (0.3, 1e-3)
    assert type(new).__name__ == (name if name == "SyncBatchNorm" else f"{name}{rank}")
    x = torch.randn(SHAPES[rank])
    assert_close(call(new.eval(), x), before[1].eval()(x), rtol=1e-5, atol=1e-5)
    if name != "FrozenBatchNorm":
        assert_close(call(new.train(), x), before[1].train()(x), rtol=1e-5, atol=1e-5)
    if name == "DecorrelatedBatchNorm":
        back = convert(result.model, to=torch.nn)
        assert [c.reason for c in back.report.left] == [
            f"it has no running_var, which BatchNorm{rank}(4) needs: recalibrate a new layer instead"
        ]
        assert type(back.model[1]) is type(new)
        return
    if name == "DomainBatchNorm":  # the domains have parted by now
        left = convert(result.model, to=torch.nn)
        assert left.report.left[0].reason.startswith(
            "the rows of its running_mean differ: convert the layer that select()"
        )
        result = convert(model, to=kind, **options)
    back = convert(result.model, to=torch.nn)
    assert repr(back.model) == repr(before)
    assert type(only_layer(back)) is type(before[1])
    if name in ("FrozenBatchNorm", "DomainBatchNorm"):  # nothing moved
        before.eval()(x)
        for key, value in model.state_dict().items():
            assert torch.equal(value, back.model.state_dict()[key])
    elif name != "ConditionalBatchNorm":
        assert_close(dict(back.model.state_dict()), dict(before.state_dict()), rtol=1e-5, atol=1e-5)
    assert vars(back.model[1]).keys() == vars(model[1]).keys()


@pytest.mark.parametrize("target", FAMILY)
@pytest.mark.parametrize("source", MEANS_THE_SAME)
def test_each_family_class_becomes_each_other(source: str, target: str) -> None:
    start = convert(trained(), to=FAMILY[source][0], **FAMILY[source][1]).model
    x = torch.randn(SHAPES["2d"])
    expected = call(start.eval(), x)
    result = convert(start, to=FAMILY[target][0], **FAMILY[target][1])
    if source == target and not FAMILY[target][1]:
        assert result.report.left[0].reason == "it is one already"
        return
    assert_close(call(only_layer(result), x), expected, rtol=1e-5, atol=1e-5)
    if target in MEANS_THE_SAME:
        back = convert(convert(result.model, to=FAMILY[source][0]).model, to=torch.nn).model
        assert type(back) is nn.BatchNorm2d
        assert_close(back(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["BatchNorm", batch.BatchNorm, batch.BatchNorm2d, "BatchNorm2d", batchnorm.nn])
def test_equivalent_arguments(to: Any) -> None:
    assert type(only_layer(convert(nn.Sequential(trained()), to=to))) is batch.BatchNorm2d


@pytest.mark.parametrize("rank", RANKS)
def test_a_name_and_a_class_without_rank_take_that_of_the_layer(rank: str) -> None:
    assert type(convert(trained(rank), to=batch.BatchNorm).model) is getattr(batch, f"BatchNorm{rank}")
    assert type(convert(trained(rank), to="BatchNorm").model) is getattr(batch, f"BatchNorm{rank}")
    fused = getattr(act, f"BatchNormAct{rank}")(4, activation="silu")
    assert type(convert(fused, to=frozen.FrozenBatchNorm).model) is getattr(frozen, f"FrozenBatchNormAct{rank}")


def test_options_are_those_of_the_class_and_leave_again() -> None:
    model = nn.Sequential(trained(momentum=0.2))
    made = convert(model, to=ghost.GhostBatchNorm, ghost_size=3, momentum=0.05).model
    assert (made[0].ghost_size, made[0].momentum) == (3, 0.05)
    assert convert(made, to=torch.nn).model[0].momentum == 0.2
    made[0].momentum = None  # set by the user since
    assert convert(made, to=torch.nn).model[0].momentum is None
    again = convert(made, to=ghost.GhostBatchNorm, ghost_size=2).model
    assert again[0].ghost_size == 2
    assert type(convert(again, to=torch.nn).model[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"track_running_stats": False}, {"bias": False}, {"affine": False, "momentum": None}],
    ids=str,
)
@pytest.mark.parametrize("name", CALLED_PLAINLY)
def test_what_a_layer_lacks_the_other_lacks(name: str, options: dict[str, Any]) -> None:
    kind, own = FAMILY[name]
    model = nn.Sequential(trained(**options), nn.ReLU())
    if name == "BatchRenorm" and "track_running_stats" in options:
        with pytest.raises(ValueError, match=r"convert cannot change any layer; 0: BatchRenorm2d expects track_runn"):
            convert(model, to=kind, **own)
        mixed = convert(nn.Sequential(model, trained()), to=kind, **own)
        assert [c.path for c in mixed.report.left] == ["0.0"]
        return
    new = only_layer(convert(model, to=kind, **own))
    assert new.state_dict().keys() == model[0].state_dict().keys()
    x = torch.randn(SHAPES["2d"])
    assert_close(new(x), model[0](x))
    assert repr(convert(nn.Sequential(new), to=torch.nn).model[0]) == repr(model[0])


class OnlyNamed(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.05)


def test_a_subclass_that_only_constructs_is_converted_and_comes_back() -> None:
    new = convert(nn.Sequential(OnlyNamed(4)), to=ghost.GhostBatchNorm).model
    assert new[0].momentum == 0.05
    assert type(convert(new, to=nn.BatchNorm2d).model[0]) is nn.BatchNorm2d
    assert type(convert(new, to=OnlyNamed).model[0]) is OnlyNamed


@pytest.mark.parametrize("to", ["torch", "ours"])
def test_lazy_layers_stay_lazy(to: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(momentum=0.3))
    if to == "torch":
        model = convert(model, to=batchnorm.nn).model
    new = convert(model, to=torch.nn if to == "torch" else batch.BatchNorm, inplace=True).model
    assert type(new[1]) is (nn.LazyBatchNorm2d if to == "torch" else batch.LazyBatchNorm2d)
    assert new[1].has_uninitialized_params()
    left = convert(new, to=ghost.GhostBatchNorm).report.left
    assert left[0].reason == "it has not seen its number of channels yet: run one batch first"
    assert new(torch.randn(3, 2, 5, 5)).shape == (3, 4, 5, 5)
    assert type(new[1]) is (nn.BatchNorm2d if to == "torch" else batch.BatchNorm2d)
    assert new[1].momentum == 0.3
    ghosts = convert(new, to=ghost.GhostBatchNorm).model
    assert type(convert(ghosts, to=torch.nn).model[1]) is nn.BatchNorm2d


def test_torchs_synchronized_layer_both_ways() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(4, momentum=0.3))
    x = torch.randn(SHAPES["2d"])
    expected = model.eval()(x)
    ours = convert(model, to=sync.SyncBatchNorm).model
    assert type(ours[0]) is sync.SyncBatchNorm
    assert ours[0].momentum == 0.3
    assert_close(ours(x), expected)
    assert type(convert(ours, to=torch.nn).model[0]) is nn.SyncBatchNorm
    assert type(convert(ours, to=nn.BatchNorm2d).model[0]) is nn.BatchNorm2d
    renormed = convert(model, to=renorm.BatchRenorm).model
    assert type(renormed[0]) is renorm.BatchRenorm  # any rank, as before
    assert type(convert(renormed, to=torch.nn).model[0]) is nn.SyncBatchNorm
    theirs = convert(nn.Sequential(trained()), to=nn.SyncBatchNorm).model
    assert type(theirs[0]) is nn.SyncBatchNorm
    through = convert(convert(nn.Sequential(trained()), to=sync.SyncBatchNorm).model, to=ghost.GhostBatchNorm).model
    assert type(through[0]) is ghost.GhostBatchNorm2d  # the rank is remembered
    assert through[0](x).shape == x.shape
    no_rank = convert(nn.Sequential(batch.BatchNorm(4)), to=torch.nn).report.left
    assert no_rank[0].reason == "it takes any number of dimensions, and torch.nn has no such layer: pass a class"


def test_other_normalizations() -> None:
    model = nn.Sequential(trained("1d"), trained("2d"), nn.BatchNorm2d(6, affine=False), nn.BatchNorm3d(64, bias=False))
    groups = convert(model, to=nn.GroupNorm).model
    assert [(m.num_groups, m.num_channels) for m in groups] == [(1, 4), (2, 4), (3, 6), (32, 64)]
    assert torch.equal(groups[1].weight, model[1].weight)
    assert torch.equal(groups[1].bias, model[1].bias)
    assert groups[2].weight is None
    assert groups[3].bias is None
    x = torch.randn(SHAPES["2d"])
    assert_close(groups[1](x), nn.functional.group_norm(x, 2, model[1].weight, model[1].bias))
    assert groups[3](torch.randn(1, 64, 2, 2, 2)).shape == (1, 64, 2, 2, 2)
    result = convert(model, to=nn.LayerNorm)
    assert_close(result.model[1](x), nn.functional.group_norm(x, 1, model[1].weight, model[1].bias))
    assert result.report.changed[0].now == "GroupNorm(1, 4)"
    assert result.report.changed[0].reason == "layer normalization over channels and positions"
    instances = convert(model, to="InstanceNorm").model
    assert [type(m) for m in instances] == [nn.BatchNorm1d, nn.InstanceNorm2d, nn.InstanceNorm2d, nn.InstanceNorm3d]
    assert_close(instances[1](x), nn.functional.instance_norm(x, weight=model[1].weight, bias=model[1].bias))
    assert instances[1].running_mean is None
    nothing = convert(model, to=nn.Identity).model
    assert [type(m) for m in nothing] == [nn.Identity] * 4
    two = convert(model, to=nn.GroupNorm, num_groups=2, eps=0.1).model
    assert [(m.num_groups, m.eps) for m in two] == [(2, 0.1)] * 4


def test_a_function_may_make_any_module() -> None:
    model = nn.Sequential(trained(), trained()).eval()
    new = convert(model, to=lambda layer: nn.GroupNorm(2, layer.num_features), only="1").model
    assert type(new[0]) is nn.BatchNorm2d
    assert torch.equal(new[1].weight, model[1].weight)
    assert not new[1].training
    kept = convert(model, to=lambda layer: layer).report
    assert [c.reason for c in kept.left] == ["the function returned the same layer"] * 2
    with pytest.raises(TypeError, match=r"the function given as `to` to return a torch.nn.Module, got int"):
        convert(model, to=lambda layer: 3)


def test_by_name_and_by_predicate() -> None:
    model = nn.ModuleDict({"stem": nn.Sequential(trained()), "body": nn.Sequential(trained("1d"), trained())})
    for only, expected in (
        ("body.*", ["body.0", "body.1"]),
        (["stem.0", "*.1"], ["stem.0", "body.1"]),
        (lambda path, layer: isinstance(layer, nn.BatchNorm1d), ["body.0"]),
        (lambda path, layer: False, []),
    ):
        report = convert(model, to=batch.BatchNorm, only=only).report
        assert [c.path for c in report.changed] == expected
        assert not report.left
    with pytest.raises(ValueError, match=r"`only` to match a layer, got 'head\.\*', which matches none of 3. .*stem.0"):
        convert(model, to=batch.BatchNorm, only=["stem.0", "head.*"])


def test_a_model_that_is_a_layer_and_one_without() -> None:
    layer = trained()
    result = convert(layer, to=batch.BatchNorm, inplace=True)
    assert type(result.model) is batch.BatchNorm2d
    assert result.model.weight is layer.weight
    assert str(convert(nn.Linear(3, 3), to=batch.BatchNorm).report) == "convert: 0 changed, 0 left"


def test_another_rank_is_left() -> None:
    report = convert(nn.Sequential(trained("1d"), trained("2d")), to=batch.BatchNorm2d).report
    assert [(c.path, c.reason) for c in report.left] == [("0", "it takes other inputs (1d) than BatchNorm2d")]


def test_a_converted_model_copies_pickles_and_comes_back() -> None:
    model = convert(nn.Sequential(trained(momentum=0.2)), to=ghost.GhostBatchNorm, ghost_size=3, momentum=0.1).model
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert repr(again) == repr(model)
        assert again.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            again[0].weight.fill_(3.0)
        back = convert(again.double(), to=torch.nn).model[0]
        assert (type(back), back.momentum) == (nn.BatchNorm2d, 0.2)
        assert (back.weight == 3.0).all() and back.weight.dtype == back.running_mean.dtype == torch.float64
        assert not {b"batchnorm.surgery", b"batchnorm.nn"} & set(re.findall(rb"batchnorm\.\w+", pickle.dumps(back)))


def test_state_that_was_loaded_or_trained_since_is_what_comes_back() -> None:
    model = convert(nn.Sequential(trained()), to=renorm.BatchRenorm).model
    other = nn.Sequential(trained())
    model.load_state_dict(other.state_dict(), assign=True)
    model.train()(torch.randn(SHAPES["2d"]))
    back = convert(model, to=torch.nn).model
    for key, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert back[0].num_batches_tracked == 6


def test_synchronized_layers_know_their_path() -> None:
    model = convert(nn.ModuleDict({"a": nn.Sequential(trained())}), to=sync.SyncBatchNorm).model
    assert model["a"][0].name == "a.0"


def test_the_fused_layer_without_activation_is_plain_batch_normalization() -> None:
    model = nn.Sequential(trained())
    new = convert(model, to=act.BatchNormAct2d).model
    assert new[0].activation == "none"
    x = torch.randn(SHAPES["2d"])
    assert_close(new(x), model(x))
    assert convert(model, to="BatchNormAct2d", activation="relu").model(x).min() == 0


def test_an_accelerated_model_is_converted_and_comes_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), trained(), nn.ReLU())
    fast = accelerate(copy.deepcopy(model)).model
    x = torch.randn(6, 3, 5, 5)
    ghosts = convert(fast, to=ghost.GhostBatchNorm, ghost_size=6).model
    assert_close(ghosts(x), model(x))
    for converted in (fast, ghosts):
        back = convert(converted, to=torch.nn).model
        assert repr(back) == repr(model)
        assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]


def test_spectral_norm_elsewhere_is_no_hindrance() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)), trained())
    new = convert(model, to=batch.BatchNorm).model.eval()
    x = torch.randn(2, 3, 5, 5)
    assert_close(new(x), model.eval()(x))


def test_a_third_party_model_trains_the_same_after_both_conversions() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model = transformers.ResNetForImageClassification(config).double().train()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    ours = convert(model, to=ghost.GhostBatchNorm, ghost_size=4)
    assert len(ours.report.changed) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) > 4
    assert not ours.report.left
    assert_close(ours.model(images).logits, model(images).logits)
    back = convert(ours.model, to=torch.nn)
    assert len(back.report.changed) == len(ours.report.changed)
    assert repr(back.model) == repr(model)
    assert_close(dict(back.model.state_dict()), dict(model.state_dict()))
    assert type(convert(model, to=nn.GroupNorm).model(images).logits) is Tensor
