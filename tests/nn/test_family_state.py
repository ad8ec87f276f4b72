"""The state of every layer of the family: saved, loaded, exchanged, and after batches that are not finite."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.testing import assert_close

from batchnorm import nn
from batchnorm.nn.frozen import FrozenBatchNorm2d
from tests.nn.test_family_contract import FAMILY, MEMBERS, SHAPE, data, layer_of, step


@MEMBERS
def test_its_state_is_saved_and_training_continues(name: str) -> None:
    layer = layer_of(name)
    step(name, layer, layer, data(seed=1))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = FAMILY[name].make(4, dtype=torch.float64)
    loaded.load_state_dict(torch.load(file))
    copies = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for x in (data(seed=2), data(seed=3)):
        expected = step(name, layer, layer, x)
        for other in copies:
            for a, b in zip(step(name, other, other, x), expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.as_batch_norm])
def test_its_state_is_that_of_batch_normalization_in_both_directions(name: str) -> None:
    theirs, ours = torch.nn.BatchNorm2d(4, dtype=torch.float64), layer_of(name)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs(data(seed=1))
    ours.load_state_dict(theirs.state_dict())
    assert_close(ours.eval()(data()), theirs.eval()(data()), rtol=1e-12, atol=1e-12)
    ours.train()(data(seed=2))
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours.eval()(data()), theirs.eval()(data()), rtol=1e-12, atol=1e-12)


@MEMBERS
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")
def test_a_checkpoint_without_a_counter_loads(name: str, assign: bool, device: str) -> None:
    source = layer_of(name)
    state = {key: value for key, value in source.state_dict().items() if key != "num_batches_tracked"}
    layer = FAMILY[name].make(4, dtype=torch.float64, device=device)
    result = layer.load_state_dict(dict(state), strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert layer.num_batches_tracked.shape == source.num_batches_tracked.shape
    assert layer.num_batches_tracked.is_meta == (device == "meta" and not assign)
    if assign or device == "cpu":
        assert not layer.num_batches_tracked.any()
        assert_close(dict(layer.state_dict()), dict(source.state_dict()))
        x = data()
        assert layer(x, *FAMILY[name].extra(len(x))).shape == x.shape


@MEMBERS
@pytest.mark.parametrize("plain", [True, False])
def test_a_checkpoint_of_this_version_without_a_counter_is_incomplete(name: str, plain: bool) -> None:
    source = nn.BatchNorm2d(4) if plain and FAMILY[name].as_batch_norm else FAMILY[name].make(4)
    state = source.state_dict()  # with the version of its format
    del state["num_batches_tracked"]
    layer = FAMILY[name].make(4, device="meta")
    if isinstance(layer, FrozenBatchNorm2d):  # it never counts batches
        assert not layer.load_state_dict(state, assign=True).missing_keys
        return
    with pytest.raises(RuntimeError, match='Missing key.s. in state_dict: "num_batches_tracked"'):
        layer.load_state_dict(state, assign=True)


@MEMBERS
@pytest.mark.parametrize("value", [torch.inf, 1e155, 1.7e308])  # σ² overflows, or also x - μ
def test_a_nonfinite_batch_is_skipped_with_the_option(name: str, value: float) -> None:
    layer = layer_of(name, on_nonfinite="skip")
    before = copy.deepcopy(dict(layer.state_dict()))
    x = data()
    x[:, :2] = value
    x[..., 0] *= -1.0
    layer(x, *FAMILY[name].extra(SHAPE[0]))
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


@MEMBERS
@pytest.mark.parametrize("value", [torch.inf, 1e155])  # the mean is not finite, or σ² overflows
def test_a_nonfinite_batch_raises_an_error_with_the_option(name: str, value: float) -> None:
    layer, extra = layer_of(name, on_nonfinite="error"), FAMILY[name].extra(SHAPE[0])
    before = copy.deepcopy(dict(layer.state_dict()))
    x = data().requires_grad_()
    bad = data()
    bad[:, :2, ::2] = value
    if not FAMILY[name].moves:  # normalizes by the running statistics
        layer(bad, *extra)
        return
    cause = "its variance overflows" if value < torch.inf else "x has NaN or infinity"
    with pytest.raises(FloatingPointError, match=rf"{name} expects finite statistics .* channels \(0, 1.*{cause}"):
        layer(bad, *extra)
    with pytest.raises(FloatingPointError), nn.update_running_stats(layer, False):
        layer(bad, *extra)
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
    layer(x, *extra).sum().backward()
    layer.eval()(bad, *extra)
    assert any(not torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@MEMBERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e16, 1e19, 4e36, 3.3e38])
def test_large_values_are_right_or_an_error(name: str, scale: float, dtype: torch.dtype) -> None:
    exact, layer = layer_of(name), layer_of(name, torch.float32, on_nonfinite="error")
    x, dy = data(), data(dtype, seed=6)
    x = ((x.sign() if scale > 1e38 else (x - 0.5) / 10.0) * scale).to(dtype)
    if not FAMILY[name].moves:
        return
    try:
        got = step(name, layer, layer, x, dy)
    except FloatingPointError:
        assert scale > 1e16
        assert layer.num_batches_tracked.sum() == 0
        return
    assert scale < 1e20
    for ours, theirs in zip(got, step(name, exact, exact, x.double(), dy.double()), strict=True):
        units = 2.0 if ours.dtype == torch.bfloat16 else FAMILY[name].units  # dx is a difference of rounded terms
        allowed = units * torch.finfo(ours.dtype).eps * theirs.abs().max() if ours.is_floating_point() else 0
        assert (ours.double() - theirs).abs().max() <= allowed


@MEMBERS
def test_an_error_for_nonfinite_batches_changes_no_other(name: str) -> None:
    propagates, raises = layer_of(name), layer_of(name, on_nonfinite="error")
    assert_close(*(step(name, layer, layer, data()) for layer in (raises, propagates)), rtol=1e-14, atol=1e-14)
