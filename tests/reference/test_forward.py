"""The reference's forward pass, running statistics and moments, by definition and against torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from batchnorm import reference as ref
from tests.cases import torch_activation
from tests.reference.definitions import INDEX, error

# --- Forward -----------------------------------------------------------------------------------------------


def test_forward_training_returns_every_intermediate_by_the_definition() -> None:
    x = np.random.default_rng(1).normal(3.0, 2.0, (4, 2, 3))
    weight, bias = np.array([2.0, -1.0]), np.array([0.5, 0.0])
    forward = ref.forward_training(x, weight, bias, eps=1e-3)
    for c in range(2):
        values = x[:, c].ravel().tolist()
        mean = math.fsum(values) / 12
        var = math.fsum((value - mean) ** 2 for value in values) / 12
        assert_allclose([forward.mean[c], forward.var[c]], [mean, var], rtol=1e-14)
        assert_allclose(forward.x_centered[:, c], x[:, c] - mean, atol=1e-14)
        assert_allclose(forward.invstd[c], (var + 1e-3) ** -0.5, rtol=1e-14)
        assert_allclose(forward.x_hat[:, c], (x[:, c] - mean) / math.sqrt(var + 1e-3), atol=1e-14)
        assert_allclose(forward.y[:, c], weight[c] * forward.x_hat[:, c] + bias[c], atol=1e-14)
    assert forward.batch is not None
    assert forward.batch.count == forward.batch.count_squares == 12
    assert_array_equal(forward.share, np.full((4, 1, 3), 1 / 12))


@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_forward_and_gradients_equal_torch(activation: str, training: bool) -> None:
    rng = np.random.default_rng(2)
    x, residual, dy = rng.normal(1.0, 2.0, (3, 4, 6, 5, 2))
    weight, bias, mean = rng.normal(size=(3, 6))
    var = rng.uniform(0.5, 2.0, 6)
    options: dict[str, Any] = {"residual": residual, "activation": activation, "negative_slope": 0.2, "eps": 1e-3}
    if training:
        forward = ref.forward_training(x, weight, bias, **options)
    else:
        forward = ref.forward_inference(x, mean, var, weight, bias, **options)
    found = ref.backward(dy, forward)

    leaves = [torch.from_numpy(a).clone().requires_grad_() for a in (x, weight, bias, residual)]
    tx, tweight, tbias, tresidual = leaves
    z = F.batch_norm(tx, torch.from_numpy(mean), torch.from_numpy(var), tweight, tbias, training, 0.0, 1e-3)
    y = torch_activation(activation, 0.2)(z + tresidual)
    expected = torch.autograd.grad(y, leaves, torch.from_numpy(dy))
    assert_allclose(forward.y, y.detach(), atol=1e-12)
    for ours, theirs in zip((found.dx, found.dweight, found.dbias, found.dz), expected, strict=True):
        assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("activation", ref.ACTIVATIONS)
def test_activation_and_derivative_equal_torch_at_kinks_and_far_out(activation: str) -> None:
    points = [*np.linspace(-8, 8, 161), -3.0, 0.0, 3.0, 6.0, -800.0, 800.0]
    z = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    y = torch_activation(activation, 0.2)(z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    f, derivative = ref.ACTIVATIONS[activation]
    at = z.detach().numpy()
    assert_allclose(f(at, 0.2), y.detach(), atol=1e-13)
    assert_allclose(derivative(at, 0.2), slope, atol=1e-13)
    assert_array_equal(f(np.array([np.nan]), 0.2), [np.nan])


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_slope_of_a_saturated_unit_keeps_its_digits(name: str) -> None:
    """f′ is tiny but not 0 there: 1 − tanh² would have no correct digit from |z| = 19 on."""
    rate = {"sigmoid": 1, "tanh": 2}[name]
    f, derivative = ref.ACTIVATIONS[name]
    z = np.array([0.5, 3.0, 10.0, 20.0, 40.0, 300.0])
    with np.errstate(all="raise"):
        expected = rate**2 * np.exp(-rate * z) / (1 + np.exp(-rate * z)) ** 2
        assert_allclose(derivative(z), expected, rtol=1e-14)
        assert_allclose(derivative(-z), expected, rtol=1e-14)
    assert_allclose(f(np.array([-math.inf, math.inf])), {"sigmoid": [0, 1], "tanh": [-1, 1]}[name])


@pytest.mark.parametrize("gain", [1.0, 30.0], ids=["usual", "saturated"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_network_of_three_layers_equals_torch(name: str, gain: float) -> None:
    rng = np.random.default_rng(11)
    x, dy = rng.normal(size=(12, 5)), rng.normal(size=(12, 5))
    layers = [(rng.normal(size=(5, 5)), np.full(5, gain), rng.normal(size=5)) for _ in range(3)]

    passes, inputs = [], [x]
    for w, weight, bias in layers:
        passes.append(ref.forward_training(inputs[-1] @ w, weight, bias, activation=name))
        inputs.append(passes[-1].y)
    found, gradient = [], dy
    for (w, _, _), forward, into in zip(layers[::-1], passes[::-1], inputs[-2::-1], strict=True):
        back = ref.backward(gradient, forward)
        found[:0] = [into.T @ back.dx, back.dweight, back.dbias]
        gradient = back.dx @ w.T

    leaves = [torch.from_numpy(a).clone().requires_grad_() for layer in layers for a in layer]
    y = start = torch.from_numpy(x).clone().requires_grad_()
    for w, weight, bias in zip(*[iter(leaves)] * 3, strict=True):
        y = getattr(torch, name)(F.batch_norm(y @ w, None, None, weight, bias, True))
    expected = torch.autograd.grad(y, [*leaves, start], torch.from_numpy(dy))
    assert_allclose(inputs[-1], y.detach(), atol=1e-12)
    for ours, theirs in zip([*found, gradient], expected, strict=True):
        assert error(ours, theirs.numpy()) < 1e-11


def test_constant_channel_gives_bias_exactly() -> None:
    x = np.full((7, 1, 3), 1e8 + 0.1)
    forward = ref.forward_training(x, [3.0], [0.25])
    assert_array_equal(forward.var, [0.0])
    assert_array_equal(forward.y, np.full(x.shape, 0.25))
    assert_array_equal(ref.backward(np.ones_like(x), forward).dweight, [0.0])


def test_conditional_uses_the_batch_statistics_and_each_samples_affine() -> None:
    x = np.random.default_rng(3).normal(size=(4, 2, 3))
    weight, bias = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [2.0, 3.0]])
    forward = ref.forward_training(x, weight, bias, index=[1, 0, 0, 1])
    x_hat = ref.forward_training(x).y
    for n, k in enumerate([1, 0, 0, 1]):
        assert_allclose(forward.y[n], weight[k][:, None] * x_hat[n] + bias[k][:, None], atol=1e-14)


def test_groups_are_normalized_apart() -> None:
    x = np.random.default_rng(4).normal(size=(5, 3, 2))
    forward = ref.forward_training(x, index=INDEX, groups=2)
    for k in range(2):
        part = [n for n in range(5) if INDEX[n] == k]
        assert_allclose(forward.y[part], ref.forward_training(x[part]).y, atol=1e-14)


def test_mask_equals_leaving_the_values_out() -> None:
    rng = np.random.default_rng(5)
    x, dy, kept = rng.normal(size=(6, 2)), rng.normal(size=(6, 2)), np.array([1, 0, 1, 1, 0, 1.0])
    dy[kept == 0] = 0
    masked, alone = ref.forward_training(x, weights=kept), ref.forward_training(x[kept == 1])
    assert_allclose(masked.y[kept == 1], alone.y, atol=1e-14)
    assert masked.batch is not None
    assert alone.batch is not None
    assert_allclose(masked.batch.var_unbiased, alone.batch.var_unbiased, rtol=1e-14)
    dx = ref.backward(dy, masked).dx
    assert_allclose(dx[kept == 1], ref.backward(dy[kept == 1], alone).dx, atol=1e-14)
    assert_array_equal(dx[kept == 0], 0)
    x[kept == 0] = np.nan  # what does not count may be anything
    assert_array_equal(ref.moments(x, weights=kept).mean, masked.mean)


def test_half_and_single_precision_inputs_are_computed_in_float64() -> None:
    x = np.random.default_rng(6).normal(size=(4, 2)).astype(np.float16)
    for dtype in (np.float16, np.float32):
        y = ref.forward_training(x.astype(dtype)).y
        assert y.dtype == np.float64
        assert_array_equal(y, ref.forward_training(x.astype(np.float64)).y)


def test_empty_batch_gives_empty_y_and_zero_gradients_and_moves_nothing() -> None:
    for activation in ref.ACTIVATIONS:
        forward = ref.forward_training(np.zeros((0, 3, 2)), [1.0, 2.0, 3.0], activation=activation)
        found = ref.backward(np.zeros((0, 3, 2)), forward)
        assert forward.y.shape == found.dx.shape == (0, 3, 2)
        assert_array_equal([found.dweight, found.dbias], np.zeros((2, 3)))
    assert forward.batch is not None
    for momentum in (0.1, None):
        after = ref.update_running(
            [1.0] * 3, [2.0] * 3, forward.batch, momentum=momentum, convention="torch", num_batches_tracked=4
        )
        assert_array_equal(after.mean, [1.0] * 3)
        assert_array_equal(after.var, [2.0] * 3)
        assert after.num_batches_tracked == 4


# --- Running statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_running_statistics_equal_torch_over_several_steps(momentum: float | None) -> None:
    rng = np.random.default_rng(7)
    layer = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    running = ref.Running(np.zeros(3), np.ones(3), np.array(0))
    for step in range(5):
        x = rng.normal(step, 1.0 + step, (2 + step, 3, 4, 2))
        layer(torch.from_numpy(x))
        batch = ref.forward_training(x).batch
        assert batch is not None
        running = ref.update_running(
            running.mean,
            running.var,
            batch,
            momentum=momentum,
            convention="torch",
            num_batches_tracked=running.num_batches_tracked,
        )
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert_allclose(running.mean, layer.running_mean, rtol=1e-12)
        assert_allclose(running.var, layer.running_var, rtol=1e-12)
        assert running.num_batches_tracked == layer.num_batches_tracked


def test_momentum_conventions_differ_in_meaning_and_in_variance() -> None:
    batch = ref.moments(np.random.default_rng(8).normal(3.0, 2.0, (4, 2, 5)))
    mean, var = np.array([1.0, -1.0]), np.array([2.0, 0.5])

    def update(convention: str, momentum: float) -> ref.Running:
        return ref.update_running(mean, var, batch, momentum=momentum, convention=convention)

    for convention in ("keras", "flax"):
        keras = update(convention, 0.99)
        assert_allclose(keras.mean, mean * 0.99 + batch.mean * (1 - 0.99), rtol=1e-14)
        assert_allclose(keras.var, var * 0.99 + batch.var * (1 - 0.99), rtol=1e-14)
    torch_ = update("torch", 0.01)
    assert_allclose(torch_.mean, update("keras", 0.99).mean, rtol=1e-12)
    assert_allclose(torch_.var - 0.99 * var, 20 / 19 * (keras.var - 0.99 * var), rtol=1e-10)
    assert_allclose(update("keras2_fused", 0.99).var, torch_.var, rtol=1e-12)


def test_cumulative_average_is_the_mean_of_all_batches() -> None:
    batches = [ref.moments(x) for x in np.random.default_rng(9).normal(size=(6, 4, 2, 3))]
    running = ref.Running(np.full(2, 50.0), np.full(2, 50.0), np.array(0))
    for batch in batches:
        running = ref.update_running(
            *running[:2], batch, momentum=None, convention="torch", num_batches_tracked=running.num_batches_tracked
        )
    assert_allclose(running.mean, np.mean([batch.mean for batch in batches], axis=0), rtol=1e-12)
    assert_allclose(running.var, np.mean([batch.var_unbiased for batch in batches], axis=0), rtol=1e-12)


def test_only_groups_that_saw_data_move() -> None:
    batch = ref.moments(np.random.default_rng(10).normal(size=(4, 2)), index=[2, 2, 0, 0], groups=3)
    old = np.full((3, 2), 5.0)
    after = ref.update_running(old, old, batch, momentum=None, convention="torch", num_batches_tracked=[0, 7, 1])
    assert_allclose(after.mean, [batch.mean[0], [5.0, 5.0], (5.0 + batch.mean[2]) / 2], rtol=1e-14)
    assert_array_equal(after.num_batches_tracked, [1, 7, 2])


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 0, 1, 1], [0.5, 2.0, 1.0, 0.25]])
def test_weighted_variance_is_unbiased(weights: list[float]) -> None:
    """Averaged over all equally likely draws of four fair coins it is a coin's variance, 1/4."""
    draws = [ref.moments(np.reshape(x, (4, 1)), weights=weights) for x in itertools.product([0, 1], repeat=4)]
    assert_allclose(np.mean([draw.var_unbiased for draw in draws]), 0.25, rtol=1e-14)
    by_count = np.mean([draw.m2 / (draw.count - 1) for draw in draws])
    assert (abs(by_count - 0.25) < 1e-14) == (weights[0] == 1), "V₁/(V₁ − 1) holds for whole counts only"


# --- Properties --------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 4), min_size=2, max_size=4).filter(lambda s: s[0] * math.prod(s[2:]) > 1)

seeds = st.integers(0, 2**32 - 1)

property_ = settings(max_examples=40, deadline=None)


@property_
@given(shapes, seeds, st.floats(-100, 100), st.floats(0.1, 10))
def test_y_does_not_depend_on_shift_nor_on_scale(shape: list[int], seed: int, shift: float, scale: float) -> None:
    x = np.random.default_rng(seed).normal(size=shape)
    y = ref.forward_training(x, eps=0.1).y
    assert_allclose(ref.forward_training(scale * x + shift, eps=0.1 * scale**2).y, y, atol=1e-10)


@property_
@given(shapes, seeds)
def test_dx_is_orthogonal_to_what_y_does_not_depend_on(shape: list[int], seed: int) -> None:
    """Exactly to a shift, and to a change of scale up to what ε leaves of it."""
    rng = np.random.default_rng(seed)
    forward = ref.forward_training(rng.normal(size=shape), eps=0.1)
    found = ref.backward(rng.normal(size=shape), forward)
    axes = (0, *range(2, len(shape)))
    assert_allclose(found.dx.sum(axis=axes), 0, atol=1e-12)
    assert_allclose((found.dx * forward.x_hat).sum(axis=axes), 0.1 * forward.invstd**3 * found.dweight, atol=1e-11)


@property_
@given(shapes, seeds, st.data())
def test_any_axis_equals_moving_it(shape: list[int], seed: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, *shape))
    weight, bias = rng.normal(size=(2, shape[1]))
    expected = ref.forward_training(x, weight, bias)
    found = ref.forward_training(np.moveaxis(x, 1, axis), weight, bias, axis=axis)
    assert_allclose(found.y, np.moveaxis(expected.y, 1, axis), atol=1e-12)
    dx = ref.backward(np.moveaxis(dy, 1, axis), found).dx
    assert_allclose(dx, np.moveaxis(ref.backward(dy, expected).dx, 1, axis), rtol=1e-9, atol=1e-9)


@property_
@given(seeds, st.lists(st.integers(0, 4), min_size=1, max_size=5), st.floats(-1e6, 1e6))
def test_merged_moments_are_those_of_all_data(seed: int, sizes: list[int], shift: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(shift, 1.0, (n, 2, 3)) for n in sizes]
    merged, whole = ref.merge([ref.moments(part) for part in parts]), ref.moments(np.concatenate(parts))
    assert merged.count == whole.count
    assert_allclose(merged.mean, whole.mean, rtol=1e-14, atol=1e-14)
    assert_allclose(merged.m2, whole.m2, rtol=1e-8)


def test_merged_parts_of_a_constant_deviate_by_exactly_0() -> None:
    merged = ref.merge([ref.moments(np.full((size, 1), 1000.1)) for size in (3, 7, 11)])
    assert_array_equal([merged.mean, merged.m2], [[1000.1], [0.0]])


def test_merge_skips_empty_parts_with_nan() -> None:
    whole = ref.moments([[1.0], [2.0], [4.0]])
    empty = ref.Moments(np.array(0.0), np.array([np.nan]), np.array([np.nan]), np.array(0.0))
    merged = ref.merge([empty, whole])
    assert_array_equal([merged.mean, merged.m2], [whole.mean, whole.m2])


@property_
@given(seeds, st.sampled_from([0, 1, 2, -1]), st.booleans())
def test_total_is_the_transpose_of_spread(seed: int, axis: int, by_row: bool) -> None:
    rng = np.random.default_rng(seed)
    t = rng.normal(size=(3, 4, 2))
    samples = t.shape[1 if axis == 0 else 0]
    layout = ref.Layout(t.shape, axis % 3, np.asarray(rng.integers(0, 5, samples)))
    v = rng.normal(size=(5, t.shape[axis]) if by_row else t.shape[axis])
    assert_allclose(np.sum(layout.spread(v) * t), np.sum(v * layout.total(t, like=v)), atol=1e-12)
