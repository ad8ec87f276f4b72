"""The module protocol: state, copies, conversion, and tools that look for batch normalization."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import swa_utils
from torch.testing import assert_close

import batchnorm as bn

DIGITS = pytest.mark.parametrize("digit", ["1d", "2d", "3d"])
KINDS = pytest.mark.parametrize("kind", ["BatchNorm", "BatchNormAct", "LazyBatchNorm"])
SHAPES = {"1d": (4, 3, 7), "2d": (4, 3, 5, 5), "3d": (4, 3, 2, 3, 4)}
TORCH = {"1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}


def make(kind: str, digit: str, **options: Any) -> Any:
    """A layer of ours that has seen one batch."""
    layer = getattr(bn, kind + digit)(*([] if kind == "LazyBatchNorm" else [3]), **options)
    layer(torch.randn(SHAPES[digit]) * 3 + 1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(0.5, 2.0)
    return layer


def theirs_of(digit: str, **options: Any) -> nn.Module:
    layer = TORCH[digit](3, **options)
    layer(torch.randn(SHAPES[digit]) * 2 - 1)
    return layer


# State


@DIGITS
@KINDS
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}],
    ids=lambda o: "-".join(o) or "default",
)
def test_state_loads_both_ways(kind: str, digit: str, options: dict[str, Any]) -> None:
    ours, theirs = make(kind, digit, **options), theirs_of(digit, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    fresh_theirs, fresh_ours = TORCH[digit](3, **options), getattr(bn, kind + digit)(
        *([] if kind == "LazyBatchNorm" else [3]), **options
    )  # fmt: skip
    for source, target in ((ours, fresh_theirs), (theirs, fresh_ours)):
        assert str(target.load_state_dict(source.state_dict(), strict=True)) == "<All keys matched successfully>"
        assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    if options.get("track_running_stats", True):
        assert fresh_theirs.num_batches_tracked == fresh_ours.num_batches_tracked == 1
    x = torch.randn(SHAPES[digit])
    if kind != "BatchNormAct":
        assert_close(fresh_ours.eval()(x), theirs.eval()(x))


@DIGITS
def test_state_from_before_the_counter_existed_loads(digit: str) -> None:
    state = theirs_of(digit).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    layer = getattr(bn, f"BatchNorm{digit}")(3)
    layer.load_state_dict(state, strict=True)
    assert layer.num_batches_tracked == 0
    assert_close(layer.running_var, state["running_var"])


def test_strict_loading_names_missing_and_misfitting_entries() -> None:
    layer, before = bn.BatchNorm2d(3), copy.deepcopy(bn.BatchNorm2d(3).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias"'):
        layer.load_state_dict(nn.BatchNorm2d(3, bias=False).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)


@DIGITS
def test_lazy_state_loads_before_the_first_batch(digit: str) -> None:
    lazy = getattr(bn, f"LazyBatchNorm{digit}")()
    again = getattr(bn, f"LazyBatchNorm{digit}")()
    again.load_state_dict(lazy.state_dict())
    assert again.has_uninitialized_params()
    again(torch.randn(SHAPES[digit]))
    assert type(again) is getattr(bn, f"BatchNorm{digit}")
    assert again.running_mean.shape == (3,)


# Copies


@DIGITS
@KINDS
def test_copies_are_equal_and_independent(kind: str, digit: str) -> None:
    layer = make(kind, digit, on_nonfinite="skip")
    layer.update_running_stats = False
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(SHAPES[digit])
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(other) == repr(layer)
        assert other.on_nonfinite == "skip"
        assert torch.equal(other(x), layer(x))
        before = layer.running_mean.clone()
        other.running_mean.add_(1)
        assert torch.equal(layer.running_mean, before)


@KINDS
def test_shared_memory_contains_the_state(kind: str) -> None:
    layer = make(kind, "2d").share_memory()
    assert all(t.is_shared() for t in layer.state_dict().values())
    layer(torch.randn(SHAPES["2d"]))
    assert layer.num_batches_tracked == 2


# Conversion


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_conversions_train(kind: str, dtype: torch.dtype) -> None:
    layer = make(kind, "2d").to(dtype)
    assert layer.weight.dtype == layer.running_var.dtype == dtype
    assert layer.num_batches_tracked.dtype == torch.int64
    x = torch.randn(SHAPES["2d"], dtype=dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
    assert layer.num_batches_tracked == 2
    torch_layer = nn.BatchNorm2d(3).double()
    torch_layer.load_state_dict({k: v.double() for k, v in layer.state_dict().items()})
    if kind != "BatchNormAct":
        assert_close(layer.eval()(x), torch_layer.eval()(x.double()).to(dtype))


def test_memory_format_goes_through_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), bn.BatchNormAct2d(4))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_normalizes_the_convolutions_result(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), bn.BatchNormAct2d(4))
    model.train(training)
    other = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    expected = other(x.double())
    assert_close(y, expected.bfloat16(), rtol=0.05, atol=0.05)
    y.float().square().mean().backward()
    expected.square().mean().backward()
    for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        if parameter.dim() == 1 and not training:
            assert_close(parameter.grad, its.grad.float(), rtol=0.05, atol=0.05)
    assert model[1].running_var.dtype == torch.float32


def test_the_scaler_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = model[0].weight.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(8, 4)).float().pow(3).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before)


# Parametrizations and hooks


class Exponential(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


def test_a_parametrized_weight_is_used_and_trained() -> None:
    layer = make("BatchNorm", "2d")
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.exp_()
    parametrize.register_parametrization(layer, "weight", Exponential())
    assert isinstance(layer, bn.BatchNorm2d)
    x = torch.randn(SHAPES["2d"])
    assert_close(layer(x), plain(x))
    (layer(x) ** 3).sum().backward()
    (plain(x) ** 3).sum().backward()
    original = layer.parametrizations.weight.original
    assert_close(original.grad, plain.weight.grad * plain.weight.detach())
    other = copy.deepcopy(layer)
    assert_close(other(x), layer(x))
    parametrize.remove_parametrizations(layer, "weight")
    assert_close(layer(x), plain(x))


def test_neighbours_are_parametrized() -> None:
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        bn.BatchNormAct2d(4),
        parametrizations.weight_norm(nn.Conv2d(4, 2, 1)),
    )
    model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_see_the_call() -> None:
    layer, seen = bn.BatchNormAct2d(3), []
    layer.register_forward_pre_hook(lambda m, args: seen.append(("before", len(args))))
    layer.register_forward_hook(lambda m, args, y: seen.append(("after", len(args))))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append(("backward", len(dx))))
    x = torch.randn(SHAPES["2d"], requires_grad=True)
    layer(x, x * 2).sum().backward()
    assert seen == [("before", 2), ("after", 2), ("backward", 2)]


# Tools that look for batch normalization


def test_plain_layers_are_torchs_and_fused_ones_are_not() -> None:
    for digit, torchs in TORCH.items():
        assert isinstance(make("BatchNorm", digit), torchs)
        assert isinstance(make("LazyBatchNorm", digit), torchs)
        assert not isinstance(make("BatchNormAct", digit), nn.modules.batchnorm._BatchNorm)
        assert isinstance(make("BatchNormAct", digit), nn.modules.batchnorm._NormBase)


def test_conversion_to_torchs_sync_takes_plain_layers_and_leaves_fused_ones() -> None:
    fused, norm = make("BatchNormAct", "2d", activation="silu"), make("BatchNorm", "2d")
    model = nn.Sequential(copy.deepcopy(norm), fused)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert converted[1] is fused
    assert_close(dict(converted[0].state_dict()), dict(norm.state_dict()), rtol=0, atol=0)
    x = torch.randn(SHAPES["2d"])
    assert_close(converted.eval()(x), fused.eval()(norm.eval()(x)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_gives_the_average_of_all_batches(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), bn.BatchNorm2d(3, momentum=momentum)).double()
    torchs = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(3, momentum=momentum)).double()
    batches = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    for network in (model, torchs):
        swa_utils.update_bn(batches, network)
    assert_close(model[1].running_var, torchs[1].running_var)
    assert_close(model[1].running_mean, torchs[1].running_mean)
    assert model[1].momentum == momentum
    assert model[1].num_batches_tracked == 3


def test_averaged_models_copy_our_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), bn.BatchNormAct1d(3))
    averaged = swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        model(torch.randn(8, 4))
        averaged.update_parameters(model)
    assert averaged.module[1].running_mean.shape == (3,)
    averaged.eval()(torch.randn(2, 4))


def test_modules_made_empty_are_filled() -> None:
    layer = nn.utils.skip_init(bn.BatchNorm2d, 3)
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(3))
    on_meta = bn.BatchNormAct2d(3, device="meta")
    on_meta.to_empty(device="cpu").reset_parameters()
    assert on_meta.num_batches_tracked == 0
    other = bn.BatchNorm2d(3, device="meta")
    other.load_state_dict(make("BatchNorm", "2d").state_dict(), assign=True)
    assert other(torch.randn(SHAPES["2d"])).isfinite().all()
