"""The executable specification, checked against finite differences, torch's autograd and brute force."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from batchnorm import reference as ref
from tests.cases import KINKS, torch_activation

Array = np.ndarray[Any, np.dtype[np.float64]]
INDEX = [1, 0, 1, 0, 1]


class Case:
    """A forward pass with all that can be differentiated: x, weight, bias, residual."""

    def __init__(
        self,
        *,
        shape: tuple[int, ...] = (5, 3, 2, 2),
        rows: int | None = None,
        given: int | bool = False,
        weights: Callable[[Array], Array] | None = None,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(0)
        self.axis = options.get("axis", 1)
        channels = shape[self.axis]
        affine = (channels,) if rows is None else (rows, channels)
        self.inputs: dict[str, Any] = {
            "x": rng.normal(2.0, 1.5, shape),
            "weight": rng.normal(1.0, 0.5, affine),
            "bias": rng.normal(0.0, 1.0, affine),
            "residual": rng.normal(0.0, 2.0, shape),
        }
        self.options = options
        if given:
            stats = (channels,) if given is True else (given, channels)
            self.options |= {"mean": rng.normal(2.0, 1.0, stats), "var": rng.uniform(0.5, 2.0, stats)}
        if weights is not None:
            self.options["weights"] = weights(rng.uniform(0.1, 2.0, np.delete(shape, self.axis)))
        self.dy = rng.normal(size=shape)
        self.v = rng.normal(size=shape)
        self.v_weight, self.v_bias = rng.normal(size=affine), rng.normal(size=affine)

    def forward(self, **changed: Array) -> ref.Forward:
        compute = ref.normalize if "mean" in self.options else ref.forward_training
        return compute(eps=0.1, **self.inputs | changed, **self.options)


def mask(w: Array) -> Array:
    return (w > 0.8).astype(np.float64)


CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(),
    "two_dims": lambda: Case(shape=(6, 2)),
    "one_channel": lambda: Case(shape=(4, 1, 3)),
    "one_sample": lambda: Case(shape=(1, 2, 3, 3)),
    "channels_last": lambda: Case(shape=(5, 2, 2, 3), axis=-1),
    "channels_first": lambda: Case(shape=(3, 5, 2), axis=0),
    "weights": lambda: Case(weights=lambda w: w),
    "mask": lambda: Case(weights=mask),
    "ghost": lambda: Case(index=INDEX, groups=2),
    "ghost_with_empty_group": lambda: Case(index=INDEX, groups=3),
    "domains": lambda: Case(index=INDEX, groups=2, rows=2),
    "conditional": lambda: Case(index=INDEX, rows=4),
    "affine_per_sample": lambda: Case(index=range(5), rows=5),
    "all_at_once": lambda: Case(
        shape=(5, 2, 2, 3), axis=-1, index=INDEX, groups=2, rows=3, weights=lambda w: w, activation="silu"
    ),
    "all_at_once_channels_first": lambda: Case(shape=(3, 5, 4), axis=0, index=INDEX, groups=2, weights=mask),
    "inference": lambda: Case(given=True),
    "inference_domains": lambda: Case(given=2, index=INDEX, rows=2),
    "inference_one_value": lambda: Case(shape=(1, 3), given=True),
} | {
    f"{kind}_{name}": lambda name=name, given=given: Case(given=given, activation=name, negative_slope=0.2)
    for name in ref.ACTIVATIONS
    for kind, given in (("training", False), ("inference", True))
}


@pytest.fixture(params=[*CASES.values()], ids=[*CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def differences(f: Callable[[Array], float], at: Array, h: float = 1e-5) -> Array:
    """The gradient of f by central differences, one entry at a time."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[i] = h
        gradient[i] = (f(at + step) - f(at - step)) / (2 * h)
    return gradient


def of(name: str, f: Callable[..., float]) -> Callable[[Array], float]:
    """f as a function of its argument called `name` alone."""
    return lambda at: f(**{name: at})


def error(found: Array, true: Array) -> float:
    """Largest difference, relative to the largest true value."""
    return float(np.abs(found - true).max() / np.abs(true).max())


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


# --- Backward ----------------------------------------------------------------------------------------------


def test_gradients_equal_finite_differences(case: Case) -> None:
    forward = case.forward()
    kinks = np.array(KINKS.get(case.options.get("activation", "none"), []))
    assert np.abs(forward.z[..., None] - kinks).min(initial=1.0) > 1e-3, "the case must stay away from the kinks"
    found = ref.backward(case.dy, forward)
    gradients = {"x": found.dx, "weight": found.dweight, "bias": found.dbias, "residual": found.dz}

    def loss(**changed: Array) -> float:
        return float(np.sum(case.dy * case.forward(**changed).y))

    for name, gradient in gradients.items():
        by_hand = differences(of(name, loss), case.inputs[name])
        assert_allclose(gradient, by_hand, rtol=1e-7, atol=1e-8, err_msg=name)


def test_by_parts_equals_closed_form(case: Case) -> None:
    forward = case.forward()
    closed, by_parts = ref.backward(case.dy, forward), ref.backward_by_parts(case.dy, forward)
    for name in ("dz", "dweight", "dbias", "dx_hat", "dx"):
        assert_allclose(getattr(by_parts, name), getattr(closed, name), rtol=1e-12, atol=1e-12, err_msg=name)


def test_by_parts_intermediates_equal_finite_differences() -> None:
    """dσ² with μ held, and dμ with σ² following x − μ, as the chain rule of the paper has them."""
    case = Case()
    x, weight = case.inputs["x"], case.inputs["weight"]
    forward = case.forward()
    found = ref.backward_by_parts(case.dy, forward)

    def loss(mean: Array, var: Array) -> float:
        return float(np.sum(case.dy * ref.normalize(x, mean, var, weight, eps=0.1).y))

    def var_about(mean: Array) -> Array:
        return ((x - mean[:, None, None]) ** 2).mean(axis=(0, 2, 3))

    dvar = differences(lambda var: loss(forward.mean, var), forward.var)
    dmean = differences(lambda mean: loss(mean, var_about(mean)), forward.mean)
    assert_allclose(found.dvar, dvar, rtol=1e-7)
    assert_allclose(found.dmean, dmean, rtol=1e-7)


def test_double_backward_equals_finite_differences_of_backward(case: Case) -> None:
    forward = case.forward()
    dz = case.dy * forward.slope

    def gradients_of(dz: Array = dz, **changed: Array) -> float:
        plain = dict(case.options)
        for option in ("activation", "negative_slope"):
            plain.pop(option, None)
        compute = ref.normalize if "mean" in plain else ref.forward_training
        found = ref.backward(dz, compute(eps=0.1, **case.inputs | changed, **plain))
        return float(
            np.sum(case.v * found.dx) + np.sum(case.v_weight * found.dweight) + np.sum(case.v_bias * found.dbias)
        )

    found = ref.double_backward(case.v, case.v_weight, case.v_bias, dz, forward)
    assert_allclose(found.dz, differences(of("dz", gradients_of), dz), rtol=1e-7, atol=1e-8)
    for name, gradient in (("x", found.dx), ("weight", found.dweight), ("bias", 0.0)):
        by_hand = differences(of(name, gradients_of), case.inputs[name])
        assert_allclose(gradient, by_hand, rtol=1e-7, atol=1e-8, err_msg=name)


def test_double_backward_equals_torch() -> None:
    case = Case()
    leaves = [torch.from_numpy(case.inputs[name]).clone().requires_grad_() for name in ("x", "weight", "bias")]
    dy = torch.from_numpy(case.dy).clone().requires_grad_()
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, 0.1)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    v = [torch.from_numpy(a) for a in (case.v, case.v_weight, case.v_bias)]
    expected = torch.autograd.grad(first, (dy, leaves[0], leaves[1]), v)
    found = ref.double_backward(case.v, case.v_weight, case.v_bias, case.dy, case.forward())
    for ours, theirs in zip(found, expected, strict=True):
        assert_allclose(ours, theirs, atol=1e-12)


def copied_backward(
    dy: Array, forward: ref.Forward, *, center_x: bool, sum_axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """The backward that is copied from page to page, for `[N, C, H, W]`: dx, dγ, dβ.

    As copied: x̂ − μ where x − μ belongs, and sums over axis 0 alone, right for `[N, C]` only.
    """

    def total(t: Array) -> Array:
        return t.sum(axis=sum_axes, keepdims=True)

    mean, invstd = forward.mean[:, None, None], forward.invstd[:, None, None]
    m = math.prod(dy.shape[axis] for axis in sum_axes)
    centered = forward.x_centered if center_x else forward.x_hat - mean
    dx_hat = dy * forward.weight[:, None, None]
    dvar = total(dx_hat * centered * -0.5 * invstd**3)
    dmean = total(dx_hat * -invstd) + dvar * total(-2 * centered) / m
    dx = dx_hat * invstd + dvar * 2 * centered / m + dmean / m
    return dx, total(dy * forward.x_hat), total(dy)


@pytest.mark.parametrize(
    ("mean", "deviation", "wrong_center", "wrong_axis", "both"),
    [(2.0, 1.5, 0.794, 1.214, 0.872), (0.0, 1.0, 0.022, 1.214, 1.138)],
    ids=["as_data_are", "standardized"],
)
def test_the_widely_copied_backward_is_wrong_and_ours_is_right(
    mean: float, deviation: float, wrong_center: float, wrong_axis: float, both: float
) -> None:
    """The relative errors of dx are those that the mathematics page states."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(mean, deviation, (8, 3, 4, 4)), rng.normal(size=(8, 3, 4, 4))
    weight = np.array([0.5, 1.0, 2.0])
    forward = ref.forward_training(x, weight)
    dy = forward.y - target  # of the squared error
    true = differences(lambda at: 0.5 * np.sum((ref.forward_training(at, weight).y - target) ** 2), x)

    def copied(*, center_x: bool, sum_axes: tuple[int, ...]) -> float:
        return error(copied_backward(dy, forward, center_x=center_x, sum_axes=sum_axes)[0], true)

    assert error(ref.backward(dy, forward).dx, true) < 1e-8
    assert error(ref.backward_by_parts(dy, forward).dx, true) < 1e-8
    assert copied(center_x=True, sum_axes=(0, 2, 3)) < 1e-8, "with both mistakes repaired it is the chain rule"
    assert copied(center_x=False, sum_axes=(0, 2, 3)) == pytest.approx(wrong_center, abs=0.001)
    assert copied(center_x=True, sum_axes=(0,)) == pytest.approx(wrong_axis, abs=0.001)
    assert copied(center_x=False, sum_axes=(0,)) == pytest.approx(both, abs=0.001)
    _, dweight, dbias = copied_backward(dy, forward, center_x=False, sum_axes=(0,))
    assert dweight.shape == dbias.shape == (1, 3, 4, 4), "not even dγ and dβ have one value per channel"


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


# --- Mistakes ----------------------------------------------------------------------------------------------

X = np.arange(12.0).reshape(4, 3)
BATCH = ref.moments(X)
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "one_dim": (lambda: ref.moments([1.0, 2.0]), r"x must have a sample and a channel axis, got \[2\]\. Reshape"),
    "axis": (lambda: ref.moments(X, axis=2), r"axis must be in \[-2, 2\), got 2\. The default is 1\."),
    "weights_shape": (lambda: ref.moments(X, weights=X), r"weights must have shape \[4\], got \[4, 3\]\."),
    "weights_sign": (lambda: ref.moments(X, weights=[1, 1, -2, 1]), r"weights must be finite and >= 0, got \[-2\.\]"),
    "weights_nan": (lambda: ref.moments(X, weights=[1, 1, np.nan, 1]), "weights must be finite and >= 0, got"),
    "index_alone": (lambda: ref.moments(X, index=[0, 0, 1, 1]), "index and groups must be given together.*groups None"),
    "groups_alone": (lambda: ref.moments(X, groups=2), "index and groups must be given together.*index None"),
    "groups_too_few": (lambda: ref.moments(X, index=[0, 0, 1, 2], groups=2), "index < groups, got"),
    "index_shape": (lambda: ref.forward_training(X, index=[0, 1]), r"index must hold 4 integers .* got \[0 1\]\."),
    "index_float": (lambda: ref.forward_training(X, index=[0.0] * 4), "index must hold 4 integers"),
    "index_negative": (lambda: ref.forward_training(X, index=[0, 1, -1, 0]), "index must hold 4 integers >= 0"),
    "one_value": (lambda: ref.forward_training(X[:1]), "more than one value per channel, got count = 1.0. Use"),
    "one_in_group": (lambda: ref.forward_training(X, index=[0, 0, 0, 1], groups=2), r"got count = \[3.0, 1.0\]"),
    "one_weighted": (lambda: ref.forward_training(X, weights=[0, 0.3, 0, 0]), "got count = 0.3"),
    "weight": (lambda: ref.forward_training(X, [1.0] * 4), r"weight must have shape \[3\].*got \[4\]\. Pass one"),
    "weight_rows": (lambda: ref.forward_training(X, np.ones((2, 3))), r"weight must have shape \[3\].*got \[2, 3\]"),
    "weight_rows_too_few": (
        lambda: ref.forward_training(X, np.ones((2, 3)), index=[0, 1, 2, 0]),
        r"\[K >= 3, 3\], got \[2, 3\]",
    ),
    "bias": (lambda: ref.forward_training(X, None, [1.0] * 2), r"must have shape \[3\].*got \[2\]"),
    "bias_unlike": (
        lambda: ref.forward_training(X, np.ones((2, 3)), np.ones(3), index=[0, 1, 0, 1]),
        r"weight and bias must have one shape, got \[\(2, 3\), \(3,\)\]\. Expand",
    ),
    "mean": (lambda: ref.forward_inference(X, [0.0], [1.0] * 3), r"mean must have shape \[3\].*got \[1\]"),
    "var": (lambda: ref.forward_inference(X, [0.0] * 3, [1.0, 1.0, -1.0]), "var and eps must be >= 0, got"),
    "eps": (lambda: ref.forward_training(X, eps=-1e-5), "var and eps must be >= 0, got .*-1e-05"),
    "residual": (lambda: ref.forward_training(X, residual=X.T), r"residual must have shape \[4, 3\], got \[3, 4\]"),
    "activation": (lambda: ref.forward_training(X, activation="selu"), r"one of \['none', .*\], got selu\. Choose"),
    "dy": (lambda: ref.backward(X.T, ref.forward_training(X)), r"dy must have shape \[4, 3\], got \[3, 4\]"),
    "no_parts": (lambda: ref.merge([]), "merge needs at least one part, got 0. Pass a list of Moments."),
    "convention": (
        lambda: ref.update_running([0.0] * 3, [1.0] * 3, BATCH, momentum=0.1, convention="jax"),
        r"convention must be one of \['torch', .*\], got jax\.",
    ),
    "momentum": (
        lambda: ref.update_running([0.0] * 3, [1.0] * 3, BATCH, momentum=1.1, convention="torch"),
        r"momentum must be in \[0, 1\], got 1\.1\. Or pass None\.",
    ),
    "running_mean": (
        lambda: ref.update_running([0.0], [1.0] * 3, BATCH, momentum=0.1, convention="torch"),
        r"running_mean must have shape \[3\], got \[1\]",
    ),
    "unbiased_of_one": (
        lambda: ref.update_running([0.0], [1.0], ref.moments([[2.0]]), momentum=0.1, convention="torch"),
        "more than one value per channel, got count = 1.0",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_imports_without_torch() -> None:
    # The package above it does import torch: an empty one takes its place.
    code = (
        "import sys, types; package = types.ModuleType('batchnorm'); package.__path__ = [sys.argv[1]];"
        "sys.modules['batchnorm'] = package; import batchnorm.reference; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(ref.__file__).parents[1])], check=True)


@pytest.mark.parametrize("groups", [None, 2])
def test_long_double_stays_long_double(groups: int | None) -> None:
    x = np.linspace(0.0, 1.0, 24).reshape(4, 2, 3).astype(np.longdouble) + 1e6
    index = None if groups is None else np.array([0, 1, 1, 0])
    forward = ref.forward_training(x, index=index, groups=groups)
    assert forward.y.dtype == ref.backward(x, forward).dx.dtype == np.longdouble
    exact = ref.forward_training((x - 1e6).astype(np.float64), index=index, groups=groups)
    digits = np.finfo(np.longdouble).eps
    assert np.abs(forward.y - exact.y).max() <= max(1e7 * digits, 1e-14)
