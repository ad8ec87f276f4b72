"""`convert` refuses layers that would be erased, and wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.nn import batch, conditional, domain, ghost
from batchnorm.surgery import convert
from tests.surgery.convert.family import trained


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
