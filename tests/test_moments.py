"""Moments: of any data, split and merged in any way, those of two passes in float64 over all of it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchnorm import moments as moments_module
from batchnorm import reference
from batchnorm.moments import Moments

OFFSETS = st.sampled_from([0.0, 1.0, -1e2, 1e4, 1e8])  # in deviations
SEEDS = st.integers(0, 2**32 - 1)


def data(seed: int, samples: int, offset: float, scale: float = 1.0, channels: int = 3, spatial: int = 4) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.standard_normal((samples, channels, spatial)) + offset) * scale


def assert_same(actual: Moments, expected: Moments | reference.Moments, offset: float = 0.0) -> None:
    """To the rounding of float64 data whose mean is `offset` deviations from zero."""
    unit = 1e-14 * (1.0 + abs(offset))
    count, mean, m2 = (np.asarray(v, dtype=np.float64) for v in (expected.count, expected.mean, expected.m2))
    np.testing.assert_allclose(actual.count.numpy(), count, rtol=1e-14)
    deviation = np.sqrt(m2 / max(count, 1))
    assert (np.abs(actual.mean.numpy() - mean) <= unit * deviation + 1e-300).all()
    # The rounding of the data moves a deviation by `unit`, so its square by about twice that.
    np.testing.assert_allclose(actual.m2.numpy(), m2, rtol=4 * unit)


def two_pass(x: np.ndarray, weights: Any = None) -> reference.Moments:
    return reference.moments(x, weights=weights)


@given(SEEDS, st.lists(st.integers(0, 9), min_size=1, max_size=6), OFFSETS, st.sampled_from([1e-6, 1.0, 1e6]))
def test_split_and_shuffled_data_have_the_moments_of_two_passes(
    seed: int, sizes: list[int], offset: float, scale: float
) -> None:
    x = data(seed, sum(sizes), offset, scale)
    shuffled = np.random.default_rng(seed).permutation(x)
    parts = [Moments.of(part) for part in np.split(shuffled, list(itertools.accumulate(sizes))[:-1])]
    assert_same(parts[0].merge(*parts[1:]), two_pass(x), offset)
    one_by_one = Moments.empty(3)
    for part in parts:
        one_by_one = one_by_one.merge(part)
    assert_same(one_by_one, two_pass(x), offset)
    assert_same(Moments.of(x), two_pass(x), offset)


@given(SEEDS, st.tuples(*[st.integers(0, 6)] * 3), OFFSETS)
def test_merging_is_associative_and_commutative(seed: int, sizes: tuple[int, int, int], offset: float) -> None:
    a, b, c = (Moments.of(data(seed + i, n, offset)) for i, n in enumerate(sizes))
    expected = a.merge(b, c)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a, b), b.merge(c).merge(a)):
        assert_same(merged, expected, offset)


@given(SEEDS, st.integers(1, 8), st.booleans(), OFFSETS)
def test_weights_count_as_much_as_they_say(seed: int, samples: int, as_tensors: bool, offset: float) -> None:
    x = data(seed, samples, offset)
    random = np.random.default_rng(seed + 1)
    weights = random.uniform(0.0, 2.0, (samples, 4)) * (random.random((samples, 4)) > 0.3)
    arguments = (torch.from_numpy(x), None, torch.from_numpy(weights)) if as_tensors else (x, None, weights)
    found, expected = Moments.of(*arguments), two_pass(x, weights)
    assert_same(found, expected, offset)
    assert (found.count_squares is None) == (found.count == 0)
    if found.count_squares is not None:
        np.testing.assert_allclose(found.count_squares.item(), expected.count_squares, rtol=1e-13)
    half = samples // 2
    merged = Moments.of(x[:half], weights=weights[:half]).merge(Moments.of(x[half:], weights=weights[half:]))
    assert_same(merged, expected, offset)
    if (weights > 0).sum() > 1:
        np.testing.assert_allclose(merged.var_unbiased.numpy(), expected.var_unbiased, rtol=1e-12 * (1 + abs(offset)))


@given(SEEDS, st.integers(1, 8), st.booleans())
def test_a_mask_selects(seed: int, samples: int, as_tensors: bool) -> None:
    x = data(seed, samples, 3.0)
    mask = np.random.default_rng(seed + 1).random((samples, 4)) > 0.4
    kept = x.transpose(0, 2, 1)[mask]
    x.transpose(0, 2, 1)[~mask] = np.nan
    found = Moments.of(*((torch.from_numpy(x), torch.from_numpy(mask)) if as_tensors else (x, mask)))
    assert_same(found, two_pass(kept.reshape(-1, 3)))
    assert found.count_squares is None
    if mask.sum() > 1:
        np.testing.assert_allclose(found.var_unbiased.numpy(), kept.var(0, ddof=1), rtol=1e-12)


def test_mask_and_weights_together_and_broadcast() -> None:
    x = data(0, 5, 2.0)
    mask, weights = np.array([[True], [False], [True], [True], [False]]), np.array([1.0, 0.5, 2.0, 0.25])
    both = np.broadcast_to(mask * weights, (5, 4))
    assert_same(Moments.of(x, mask, weights), two_pass(x, both))
    assert_same(Moments.of(torch.from_numpy(x), torch.from_numpy(mask), torch.from_numpy(weights)), two_pass(x, both))


def test_merging_weighted_with_plain_counts() -> None:
    x, weights = data(0, 6, 1.0), np.full((3, 4), 0.5)
    merged = Moments.of(x[:3], weights=weights).merge(Moments.of(x[3:]))
    expected = two_pass(x, np.concatenate([weights, np.ones((3, 4))]))
    np.testing.assert_allclose(merged.var_unbiased.numpy(), expected.var_unbiased, rtol=1e-13)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 2), (7, 3, 2, 3), (7, 3, 2, 1, 2), (1, 3, 5)])
@pytest.mark.parametrize("part", [1, 5, 2**22])
def test_any_shape_and_any_size_of_parts(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], part: int) -> None:
    monkeypatch.setattr(moments_module, "_PART", part)
    x = np.random.default_rng(0).standard_normal(shape) + 5
    assert_same(Moments.of(x), two_pass(x))
    assert_same(Moments.of(torch.from_numpy(x)), two_pass(x))
    assert_same(Moments.of(np.moveaxis(x, 1, -1), axis=-1), two_pass(x))
    assert_same(Moments.of(torch.from_numpy(x).movedim(1, 0), axis=0), two_pass(x))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64", "bool"])
def test_any_real_dtype_without_rounding(dtype: str) -> None:
    x = (np.random.default_rng(0).random((64, 2, 9)) * 200).astype(dtype)
    expected = two_pass(x.astype(np.float64))
    found = (Moments.of(x), Moments.of(torch.from_numpy(x)))
    for each in found:
        assert_same(each, expected)
        assert each.mean.dtype == each.m2.dtype == each.count.dtype == torch.float64
    assert_same(Moments.of(torch.from_numpy(x).to(torch.float32).bfloat16()), two_pass(
        torch.from_numpy(x).to(torch.float32).bfloat16().double().numpy()))  # fmt: skip


def test_what_numpy_hands_out_otherwise() -> None:
    x = data(0, 6, 0.0)
    x.flags.writeable = False
    assert_same(Moments.of(x[::-1]), two_pass(x))
    assert_same(Moments.of(x.astype(">f8")), two_pass(x))


def test_a_channels_last_and_a_differentiable_tensor() -> None:
    x = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    found = Moments.of(x)
    assert_same(found, two_pass(x.detach().double().numpy()))
    assert not found.mean.requires_grad


def test_a_constant_channel_has_no_deviation() -> None:
    found = Moments.of(np.full((1000, 2), 12345.678))
    assert found.m2.max() <= 1e-18
    assert (found.std <= 1e-10).all()


def test_properties_are_numpys() -> None:
    x = data(3, 9, 1.5)
    found, values = Moments.of(x), x.transpose(0, 2, 1).reshape(-1, 3)
    np.testing.assert_allclose(found.var.numpy(), values.var(0), rtol=1e-13)
    np.testing.assert_allclose(found.var_unbiased.numpy(), values.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(found.std.numpy(), values.std(0), rtol=1e-13)
    assert found.count == 36
    assert_same(Moments.of(x[:4]).update(x[4:]), two_pass(x))


@pytest.mark.parametrize("nothing", [torch.zeros(0, 3, 4), torch.zeros(5, 3, 0), np.zeros((0, 3))])
def test_nothing_merges_as_nothing(nothing: Any) -> None:
    empty = Moments.of(nothing)
    assert empty.count == 0
    assert empty.var.isnan().all()
    some = Moments.of(data(0, 4, 1.0))
    poisoned = Moments(torch.tensor(0.0), torch.full((3,), torch.nan), torch.full((3,), torch.nan))
    for merged in (some.merge(empty), empty.merge(some), poisoned.merge(some), some.merge(poisoned, empty)):
        assert_same(merged, some)
    assert empty.merge(Moments.empty(3)).count == 0
    with pytest.raises(ValueError, match=r"expects more than one value per channel, got a count of 0"):
        _ = empty.var_unbiased


def test_all_masked_is_nothing() -> None:
    x = torch.full((4, 3, 2), torch.nan)
    found = Moments.of(x, torch.zeros(4, 2, dtype=torch.bool))
    assert found.count == 0
    assert_same(Moments.of(data(0, 4, 1.0)).merge(found), Moments.of(data(0, 4, 1.0)))


def test_one_value_has_no_unbiased_variance() -> None:
    single = Moments.of(torch.ones(1, 3))
    assert (single.var == 0).all()
    with pytest.raises(ValueError, match=r"more than one value per channel, got a count of 1\. .* or use var"):
        _ = single.var_unbiased
    weighted = Moments.of(torch.ones(2, 3), weights=torch.tensor([0.3, 0.0]))
    with pytest.raises(ValueError, match=r"got a count of 0\.3"):
        _ = weighted.var_unbiased


def test_a_value_that_is_not_finite_stays_in_its_channel() -> None:
    x = torch.ones(4, 3)
    x[1, 0] = torch.nan
    assert Moments.of(x).mean.isnan().tolist() == [True, False, False]


def test_it_is_immutable_and_made_from_plain_numbers() -> None:
    made = Moments(2, torch.tensor([1.0]), [2.0])  # type: ignore[arg-type]
    assert made.count.dtype == torch.float64
    assert made.var.item() == 1.0
    with pytest.raises(AttributeError):
        made.count = torch.tensor(3.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, r"expects x to be a torch.Tensor or a numpy.ndarray, got list"),
        ((np.array([["a"]]),), TypeError, r"expects x to hold real numbers, got <U1"),
        ((torch.zeros(2, 2, dtype=torch.cfloat),), TypeError, r"expects x to hold real numbers, got torch.complex64"),
        ((torch.zeros(4),), ValueError, r"expects x of shape \[N, C, \*S\], got \[4\] \(1 dims\)"),
        ((torch.zeros(2, 3), torch.ones(2)), TypeError, r"a mask of booleans, got torch.float32. Pass numbers as w"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)), ValueError,
         r"mask of shape \[N, \*S\] = \[2, 4\] or broadcastable to it, got \[2, 3, 4\]. It has no channel axis"),
        ((torch.zeros(2, 3), None, torch.ones(3)), ValueError, r"weights of shape \[N, \*S\] = \[2\]"),
        ((torch.zeros(2, 3), None, torch.tensor([1.0, -1.0])), ValueError, r"weights that are finite and >= 0"),
        ((np.zeros((2, 3)), None, np.array([1.0, np.nan])), ValueError, r"weights that are finite and >= 0"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Moments.of(*arguments)


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parts with 3 channels, got one with 2"):
        Moments.empty(3).merge(Moments.empty(2))
    with pytest.raises(ValueError, match=r"axis in \[-2, 2\) for x of shape \[2, 3\], got 2"):
        Moments.of(torch.zeros(2, 3), axis=2)
    with pytest.raises(ValueError, match=r"Moments expects m2 of shape \[2\], got \[3\]"):
        Moments(torch.tensor(1.0), torch.zeros(2), torch.zeros(3))
