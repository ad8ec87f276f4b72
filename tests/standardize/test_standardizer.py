"""The Standardizer: statistics, transforms, weights, missing values, and the layer that does the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm.nn.frozen import FrozenBatchNorm1d, FrozenBatchNorm2d
from batchnorm.standardize import Standardizer
from tests.standardize.tables import assert_same, fitted, table

# Statistics


@pytest.mark.usefixtures("small_parts")
def test_mean_and_deviation_are_those_of_two_passes() -> None:
    x = table()
    s = Standardizer().fit(x)
    np.testing.assert_allclose(s.mean_, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(s.var_, x.var(0), rtol=1e-13)
    np.testing.assert_allclose(s.transform(x), (x - x.mean(0)) / x.std(0), rtol=1e-12, atol=1e-13)
    assert (s.n_samples_seen_, s.n_features_in_) == (60, 4)


def test_a_mean_of_1e8_deviations_costs_what_float64_loses_itself() -> None:
    x = np.arange(1001.0)[:, None] + 5e10
    s = Standardizer().fit(x)
    assert s.mean_.item() == 5e10 + 500
    assert s.var_.item() == (1001**2 - 1) / 12
    assert s.transform(x)[500].item() == 0.0


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.bfloat16])
def test_images_are_standardized_per_channel(axis: int, dtype: torch.dtype) -> None:
    x = (40 * torch.rand(6, 3, 5, 4)).to(dtype)
    x = x.movedim(1, axis)
    y = Standardizer(channel_axis=axis).fit_transform(x)
    assert isinstance(y, torch.Tensor) and y.shape == x.shape
    assert y.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    z = x.movedim(axis, 1).double().transpose(0, 1).flatten(1)
    expected = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, correction=0)).to(y.dtype)
    assert_close(y.movedim(axis, 1).transpose(0, 1).flatten(1), expected)


def test_constant_features_are_centred_only() -> None:
    x = table()
    x[:, 1] = 0.1
    s = Standardizer().fit(x)
    assert s.scale_[1] == 1.0 and s.var_[1] == 0.0
    assert (s.transform(x)[:, 1] == 0.0).all()


@pytest.mark.parametrize("with_mean", [True, False])
@pytest.mark.parametrize("with_std", [True, False])
def test_inverse_transform_undoes_transform(with_mean: bool, with_std: bool) -> None:
    x = table()
    s = Standardizer(with_mean=with_mean, with_std=with_std).fit(x)
    y = s.transform(x)
    np.testing.assert_allclose(s.inverse_transform(y), x, rtol=1e-13)
    assert np.allclose(y.mean(0), 0) == with_mean
    assert np.allclose(y.std(0), 1) == with_std


def test_weights_count_like_repeated_samples() -> None:
    x, w = table(), np.arange(60) % 3
    assert_same(Standardizer().fit(x, sample_weight=w), Standardizer().fit(np.repeat(x, w, axis=0)))
    assert Standardizer().fit(x, sample_weight=w / 2).n_samples_seen_ == w.sum() / 2
    for wrong in (-np.ones(60), np.full(60, np.nan), np.zeros(60)):
        with pytest.raises(ValueError, match="sample_weight >= 0, finite and not all zero"):
            Standardizer().fit(x, sample_weight=wrong)
    with pytest.raises(ValueError, match="of shape \\[N\\] = \\[60\\], got \\[59\\]"):
        Standardizer().fit(x, sample_weight=w[1:])


@pytest.mark.usefixtures("small_parts")
def test_omitted_nan_leaves_the_statistics_of_the_rest() -> None:
    x = table()
    x[3:9, 0] = x[20, 2] = np.nan
    x[:, 3] = np.nan
    with pytest.raises(ValueError, match="got NaN in its data. nan_policy='omit'"):
        Standardizer(nan_policy="raise").fit(x)
    s = Standardizer().fit(x)
    np.testing.assert_allclose(s.mean_[:3], np.nanmean(x[:, :3], 0), rtol=1e-13)
    np.testing.assert_allclose(s.var_[:3], np.nanvar(x[:, :3], 0), rtol=1e-13)
    assert np.isnan(s.mean_[3]) and s.n_samples_seen_.tolist() == [54, 60, 59, 0]
    assert (np.isnan(s.transform(x)) == np.isnan(x)).all()
    with pytest.raises(ValueError, match="finite statistics of every feature, got NaN or infinity"):
        s.to_layer()
    assert np.isnan(Standardizer(nan_policy="propagate").fit(x).mean_).tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="got infinity"):
        Standardizer(nan_policy="omit").fit(np.array([[1.0], [np.inf]]))
    with pytest.raises(ValueError, match="nan_policy to be one of 'raise', 'omit', 'propagate', got 'drop'"):
        Standardizer(nan_policy="drop").fit(x)


def test_a_missing_value_leaves_the_bits_of_other_features() -> None:
    x = table(500)
    complete, x[7, 2] = Standardizer().fit(x.copy()), np.nan
    found = Standardizer().fit(x)
    assert found.n_samples_seen_.tolist() == [500, 500, 499, 500]
    for ours, theirs in zip(fitted(found)[:3], fitted(complete)[:3], strict=True):
        np.testing.assert_allclose(np.delete(ours, 2), np.delete(theirs, 2), rtol=1e-15)


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_weights_may_have_any_unit(unit: float) -> None:
    x, w = table(), np.arange(60.0)
    expected = np.cov(x.T, ddof=0, aweights=w).diagonal()
    np.testing.assert_allclose(Standardizer().fit(x, sample_weight=unit * w).var_, expected, rtol=1e-13)


def test_state_survives_pickling_and_copying() -> None:
    s = Standardizer(with_std=False).fit(table())
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert_same(s, other, rtol=0)
        np.testing.assert_array_equal(other.transform(table()), s.transform(table()))
    assert repr(s) == "Standardizer(with_std=False)"


# As a layer


@pytest.mark.parametrize("options", [{}, {"with_mean": False}, {"with_std": False}])
def test_the_layer_does_what_transform_does(options: dict[str, bool]) -> None:
    x = torch.rand(8, 3, 4, 5) * torch.tensor([1e-6, 1.0, 255.0]).view(3, 1, 1)
    s = Standardizer(**options).fit(x)
    layer = s.to_layer()
    assert type(layer) is FrozenBatchNorm2d and not layer.training and layer.weight is None
    assert_close(layer(x), s.transform(x), rtol=1e-5, atol=1e-5)
    exact = s.to_layer(dtype=torch.float64)
    assert_close(exact(x.double()), s.transform(x.double()), rtol=1e-11, atol=1e-11)
    assert type(Standardizer().fit(table()).to_layer()) is FrozenBatchNorm1d
    assert_close(nn.Sequential(layer, nn.Flatten()).train()(x[:1]), s.transform(x[:1]).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_layer_is_right_for_every_unit_or_says_that_it_cannot_be(dtype: torch.dtype, offset: float) -> None:
    number, right = torch.finfo(dtype), set()
    # All units whose values and reciprocals the dtype has.
    small, large = {torch.float16: (-4, 3), torch.float64: (-150, 150)}.get(dtype, (-36, 36))
    exponents = range(-310, 300, 3 if dtype == torch.float64 else 1)
    for exponent in exponents:
        x = torch.from_numpy(table(40, 2, offset=offset) * np.array([10.0**exponent, 1.0]))
        given = x.to(dtype)
        with contextlib.suppress(ValueError):  # the data overflow, or the error says what cannot be represented
            s = Standardizer().fit(x)
            layer, expected = s.to_layer(dtype=dtype), s.transform(given.double())
            right.add(exponent)
            assert_close(layer(given).double(), expected, rtol=16 * number.eps, atol=64 * number.eps)
    assert {e for e in exponents if small <= e <= large} <= right


def test_only_variances_out_of_range_need_a_weight() -> None:
    x = torch.from_numpy(table(columns=3) * np.array([1e-22, 1.0, 1e20]))
    layer = Standardizer().fit(x).to_layer(dtype=torch.float32)
    assert layer.weight.tolist()[1] == 1 and layer.bias is None and not layer.weight.requires_grad
    assert_close(layer.running_var[1].item(), float(x[:, 1].var(correction=0)), rtol=1e-6, atol=0)
    with pytest.raises(
        ValueError, match=r"that torch.float16 can represent, got mean .*e-22 .* of feature 0. Use another"
    ):
        Standardizer().fit(x).to_layer(dtype=torch.float16)


# Masked arrays and outputs


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("shape", [(30, 4), (9, 4, 3)])
def test_masked_values_count_as_missing(dtype: Any, shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    x = np.ma.MaskedArray(generator.integers(0, 99, shape).astype(dtype), generator.random(shape) < 0.3)
    missing = x.astype(float).filled(np.nan)
    s = Standardizer(nan_policy="omit").fit(x)
    assert_same(s, Standardizer(nan_policy="omit").fit(missing))
    assert_same(s, Standardizer(nan_policy="omit").partial_fit(x[:5]).partial_fit(x[5:]))
    assert_same(s, Standardizer(nan_policy="omit").fit([x[:5], x[5:]]))
    for change in (s.transform, s.inverse_transform):
        y = change(x)
        assert isinstance(y, np.ma.MaskedArray) and (y.mask == x.mask).all()
        np.testing.assert_allclose(y.filled(np.nan), change(missing), rtol=1e-5)
        out = np.ma.MaskedArray(np.empty(shape), mask=True)
        assert change(x, out=out) is out and (out.mask == x.mask).all()
        np.testing.assert_allclose(change(x, out=np.empty(shape)), change(missing), rtol=1e-12)
    assert np.isnan(Standardizer(nan_policy="propagate").fit(x).mean_).all()
    strict = Standardizer(nan_policy="raise")
    for use in (strict.fit, strict.partial_fit, Standardizer(nan_policy="raise").fit(x.filled(0)).transform):
        with pytest.raises(ValueError, match=rf"expects no masked values, got {x.mask.sum()} of them"):
            use(x)
    whole = np.ma.MaskedArray(x.filled(0))
    assert_same(Standardizer().fit(whole), Standardizer().fit(x.filled(0)))


def test_a_masked_tensor_is_refused() -> None:
    with pytest.warns(UserWarning, match="prototype"):
        x = torch.masked.masked_tensor(torch.ones(3, 2), torch.ones(3, 2) > 0)
    with pytest.raises(TypeError, match="expects a plain tensor, got a MaskedTensor"):
        Standardizer().fit(x)


@pytest.mark.parametrize("name", ["transform", "inverse_transform"])
def test_an_output_that_cannot_hold_fractions_is_refused(name: str) -> None:
    x = table()
    change = getattr(Standardizer().fit(x), name)
    for out in (np.zeros(x.shape, int), np.zeros(x.shape, bool), np.zeros(x.shape, complex), np.zeros(x.shape, object),
                torch.zeros(x.shape, dtype=torch.int32), x.tolist()):  # fmt: skip
        before = copy.deepcopy(out)
        with pytest.raises(TypeError, match="expects out to be an array or tensor of a floating-point dtype, got"):
            change(x, out=out)
        assert np.array_equal(np.asarray(out), np.asarray(before))
    for out in (np.zeros(x.shape, np.float32), torch.zeros(x.shape, dtype=torch.float64)):
        np.testing.assert_allclose(np.asarray(change(x, out=out)), change(x), rtol=1e-5, atol=1e-5)
