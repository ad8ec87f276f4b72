"""convert: every class to every other and back, with everything that hangs on a layer, and nothing lost silently."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import batchnorm.nn
from batchnorm.models.report import Result
from batchnorm.nn import act, batch, conditional, decorrelated, domain, frozen, ghost, renorm, sync
from batchnorm.surgery import convert
from batchnorm.surgery.accelerate.accelerate import accelerate
from batchnorm.surgery.convert.ranks import rank_of

RANKS = ("1d", "2d", "3d")
SHAPES = {"1d": (6, 4, 5), "2d": (6, 4, 3, 5), "3d": (6, 4, 3, 2, 3)}
# Each algorithm, with options that make it plain batch normalization of a batch, so that outputs can be compared.
FAMILY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "BatchNorm": (batch.BatchNorm, {}),
    "BatchRenorm": (renorm.BatchRenorm, {"rmax": 1.0, "dmax": 0.0}),
    "GhostBatchNorm": (ghost.GhostBatchNorm, {"ghost_size": 6}),
    "SyncBatchNorm": (sync.SyncBatchNorm, {}),
    "FrozenBatchNorm": (frozen.FrozenBatchNorm, {}),
    "DomainBatchNorm": (domain.DomainBatchNorm, {"num_domains": 2}),
    "ConditionalBatchNorm": (conditional.ConditionalBatchNorm, {"num_classes": 3}),
    "DecorrelatedBatchNorm": (decorrelated.DecorrelatedBatchNorm, {"group_size": 1}),
}
CALLED_PLAINLY = ("BatchNorm", "BatchRenorm", "GhostBatchNorm", "SyncBatchNorm")
MEANS_THE_SAME = (*CALLED_PLAINLY, "FrozenBatchNorm")


def trained(rank: str = "2d", **options: Any) -> nn.Module:
    """A torch layer with values in everything."""
    layer = getattr(nn, f"BatchNorm{rank}")(4, **options)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(5)
    return layer


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


class OnlyNamed(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.05)


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


def values_are_kept(layer: nn.Module, x: Tensor) -> bool:
    """Whether different samples come out of the layer differently."""
    return bool(layer(x).std(0).max() > 1e-3)


@pytest.mark.parametrize("make", [nn.BatchNorm1d, batch.BatchNorm1d, batch.BatchNorm, ghost.GhostBatchNorm1d])
@pytest.mark.parametrize("to", [nn.GroupNorm, "GroupNorm", nn.LayerNorm])
@pytest.mark.parametrize("channels", [1, 2, 3, 16, 31, 48, 1024])
def test_rows_without_positions_are_not_erased(make: Any, to: Any, channels: int) -> None:
    options = {"ghost_size": 4} if make is ghost.GhostBatchNorm1d else {}
    model, report = convert(nn.Sequential(make(channels, **options)), to=to)
    assert values_are_kept(model, torch.randn(8, channels))
    assert bool(report.left) == (channels == 1)
    if channels > 1:
        groups = model[0].num_groups
        assert groups <= 32
        assert groups == 1 or channels // groups >= 16
        assert groups == (1 if to is nn.LayerNorm else {48: 3, 1024: 32}.get(channels, 1))


@pytest.mark.parametrize(
    ("to", "options"), [(nn.GroupNorm, {"num_groups": 8}), (nn.InstanceNorm1d, {}), ("InstanceNorm", {})]
)
def test_one_value_per_group_is_left_with_the_reason(to: Any, options: dict[str, Any]) -> None:
    report = convert(nn.Sequential(nn.BatchNorm1d(8)), to=to, **options).report
    assert "would erase an input with one position, such as [N, C], because a group" in report.left[0].reason
    model = convert(nn.Sequential(nn.BatchNorm1d(8)), to=lambda layer: nn.InstanceNorm1d(8, affine=True)).model
    assert type(model[0]) is nn.InstanceNorm1d
    for rank, expected in (("1d", nn.BatchNorm1d), ("2d", nn.InstanceNorm2d)):
        layer = getattr(nn, f"BatchNorm{rank}")(8)
        assert type(convert(nn.Sequential(layer), to="InstanceNorm").model[0]) is expected
        any_rank = convert(nn.Sequential(batch.BatchNorm(8)), to=getattr(nn, f"InstanceNorm{rank}"))
        assert type(any_rank.model[0]) is (batch.BatchNorm if rank == "1d" else expected)
    report = convert(nn.Sequential(nn.BatchNorm1d(8)), to=lambda layer: nn.GroupNorm(8, 8)).report
    assert report.changed[0].reason == "one channel per group: an input with one position would be erased"


def test_a_convolution_or_an_example_shows_that_there_are_positions() -> None:
    alone = nn.Sequential(nn.BatchNorm1d(8))
    beside = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.BatchNorm1d(8))
    linear = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))
    for to, expected in (("InstanceNorm", nn.InstanceNorm1d), (nn.GroupNorm, nn.GroupNorm)):
        options = {"num_groups": 8} if to is nn.GroupNorm else {}
        assert type(convert(beside, to=to, **options).model[2]) is expected
        assert type(convert(linear, to=to, **options).model[1]) is nn.BatchNorm1d
        assert type(convert(alone, to=to, example_inputs=torch.randn(4, 8, 5), **options).model[0]) is expected
        for shape in ((4, 8), (4, 8, 1)):
            report = convert(alone, to=to, example_inputs=torch.randn(shape), **options).report
            assert [change.path for change in report.left] == ["0"]
    assert convert(beside, to=nn.GroupNorm).model[2].num_groups == 4
    assert convert(alone, to=nn.GroupNorm, example_inputs=torch.randn(4, 8, 5)).model[0].num_groups == 4
    one = convert(nn.Sequential(nn.BatchNorm2d(8)), to=nn.GroupNorm, example_inputs=torch.randn(4, 8, 1, 1)).model
    assert one[0].num_groups == 1
    pooled = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    report = convert(pooled, to="InstanceNorm", example_inputs=torch.randn(4, 3, 9, 9)).report
    assert [change.path for change in report.left] == ["2"]


@pytest.mark.parametrize("channels", [2, 6, 32, 33])
def test_a_map_of_one_position_is_not_erased_by_the_default_groups(channels: int) -> None:
    model = convert(nn.Sequential(nn.BatchNorm2d(channels)), to=nn.GroupNorm).model
    assert values_are_kept(model, torch.randn(64, channels, 1, 1))
    report = convert(nn.Sequential(nn.BatchNorm2d(channels)), to=nn.GroupNorm, num_groups=channels).report
    assert report.changed[0].reason == "one channel per group: an input with one position would be erased"


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


def test_a_class_without_place_for_the_weight_is_refused() -> None:
    report = convert(nn.Sequential(trained()), to=conditional.ConditionalBatchNorm).report
    assert report.left[0].reason == "ConditionalBatchNorm2d(4) has no place for its bias, weight"


@pytest.mark.parametrize(
    ("to", "options", "error", "message"),
    [
        (3, {}, TypeError, r"convert expects `to` to be a class of normalization, .* got 3"),
        (nn.Linear, {}, TypeError, r"got <class 'torch.nn.modules.linear.Linear'>. For a class of your own pass"),
        ("BatchNrom", {}, TypeError, r"to name a class of batchnorm.nn or torch.nn, got 'BatchNrom'"),
        ("sync", {}, TypeError, r"to name a class of batchnorm.nn or torch.nn, got 'sync'"),
        (ghost.GhostBatchNorm, {"ghost_sise": 3}, TypeError, r"GhostBatchNorm2d expects options among eps, .*'ghost_s"),
        (domain.DomainBatchNorm, {}, TypeError, r"DomainBatchNorm2d expects num_domains, got none. Pass num_domains="),
        (ghost.GhostBatchNorm, {"ghost_size": 0}, ValueError,
         r"convert cannot change any layer; 0: GhostBatchNorm2d expects ghost_size >= 1, got 0"),
        (nn.GroupNorm, {"num_groups": 3}, ValueError, r"convert cannot change any layer; 0: num_channels"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_and_changes_nothing(
    to: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = nn.Sequential(trained(), trained("1d"))
    before, state = list(model), [dict(vars(m)) for m in model]
    with pytest.raises(error, match=message):
        convert(model, to=to, inplace=True, **options)
    assert all(a is b for a, b in zip(model, before, strict=True))
    assert [dict(vars(m)) for m in model] == state


def test_an_exception_on_the_way_changes_nothing() -> None:
    model = nn.Sequential(trained(), trained())
    before, calls = list(model), []

    def fails(layer: nn.Module) -> nn.Module:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyError("mine")
        return nn.Identity()

    with pytest.raises(KeyError, match="mine"):
        convert(model, to=fails, inplace=True)
    assert all(a is b for a, b in zip(model, before, strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
def test_a_scripted_model_and_one_that_cannot_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match=r"convert expects a model in Python, got RecursiveScriptModule"):
        convert(torch.jit.script(nn.Sequential(nn.BatchNorm2d(3))), to=batch.BatchNorm)
    model = nn.Sequential(trained())
    model.result = (i for i in range(3))
    with pytest.raises(ValueError, match=r"a model that can be copied, got Sequential with .* Pass inplace=True"):
        convert(model, to=batch.BatchNorm)
    assert type(convert(model, to=batch.BatchNorm, inplace=True).model[0]) is batch.BatchNorm2d


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
