"""y, its gradients and the moving statistics against the reference in float64."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from batchnorm import reference
from batchnorm.keras import BatchNormalization
from batchnorm.keras.activations import FUSED
from batchnorm.reference import ACTIVATIONS
from tests.keras.cases.derivatives import BACKEND, HAS_GRADIENTS, MODES, as_arrays, forward_and_gradients

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDINGS = 16

SHAPES = [((16, 7, 9, 5), -1), ((16, 5, 7, 9), 1), ((1500, 5), -1), ((4, 5, 3, 2, 6), 2)]
POINTS = [(*SHAPES[0], 1.0), (*SHAPES[0], 1e4), *((*shape, 1e6) for shape in SHAPES)]


def data(shape: tuple[int, ...], axis: int, mean: float = 0.0, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    channels = shape[axis]
    as_dtype = lambda t: as_arrays(ops.cast(ops.convert_to_tensor(t), dtype))[0].astype(np.float64)  # noqa: E731
    return {
        "x": as_dtype(rng.normal(size=shape) + mean),
        "dy": as_dtype(rng.normal(size=shape)),
        "gamma": rng.uniform(0.5, 1.5, channels).astype(np.float32),
        "beta": rng.normal(size=channels).astype(np.float32),
    }


def layer_for(values: dict[str, np.ndarray], axis: int, **options: object) -> BatchNormalization:
    layer = BatchNormalization(axis=axis, momentum=0.5, **options)
    layer.build(values["x"].shape)
    layer.gamma.assign(values["gamma"])
    layer.beta.assign(values["beta"])
    return layer


def expected(
    values: dict[str, np.ndarray], axis: int, activation: str = "none", parameter: float = 0.0,
    weights: np.ndarray | None = None,
) -> tuple[reference.Forward, list[np.ndarray]]:  # fmt: skip
    forward = reference.forward_training(
        values["x"], values["gamma"], values["beta"], axis=axis, eps=1e-3, activation=activation,
        negative_slope=parameter, weights=weights,
    )  # fmt: skip
    gradients = reference.backward(values["dy"], forward)
    return forward, [forward.y, gradients.dx, gradients.dweight, gradients.dbias]


def assert_close(actual: list[np.ndarray], wanted: list[np.ndarray], dtype: str = "float32") -> None:
    """The error of each is a few roundings of its largest value, or of the largest sum of its terms."""
    for name, got, true in zip(("y", "dx", "dgamma", "dbeta"), actual, wanted, strict=False):
        terms = np.sqrt(wanted[0].size / true.size) if name in ("dgamma", "dbeta") else 1.0
        unit = UNIT[dtype if name in ("y", "dx") else "float64" if dtype == "float64" else "float32"]
        allowed = ROUNDINGS * UNIT["float64" if dtype == "float64" else "float32"] + (unit if unit > 1e-6 else 0.0)
        np.testing.assert_allclose(
            got.astype(np.float64), true, rtol=0, atol=allowed * max(np.abs(true).max(), terms), err_msg=name
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis", "mean"), POINTS)
def test_error_does_not_grow_with_the_mean(shape, axis, mean, mode):
    values = data(shape, axis, mean)
    forward, wanted = expected(values, axis)
    layer = layer_for(values, axis)
    actual = forward_and_gradients(layer, values["x"], values["dy"], None, mode)
    assert_close(actual, wanted)
    assert len(actual) == (4 if HAS_GRADIENTS else 1)
    np.testing.assert_allclose(as_arrays(layer.moving_mean)[0], 0.5 * forward.mean, rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(as_arrays(layer.moving_variance)[0], 0.5 + 0.5 * forward.var, rtol=3e-6)


FUNCTIONS = [f for f, _, _ in FUSED] + [keras.activations.sigmoid]


def test_every_activation_of_keras_is_known():
    assert {name for _, name, _ in FUSED} == {*ACTIVATIONS} - {"none", "sigmoid"}


# Without operators that apply them, Keras's functions are called.
@pytest.mark.parametrize("function", FUNCTIONS if BACKEND in ("torch", "jax") else FUNCTIONS[:1])
def test_activation_is_keras_function(function):
    shape, axis = (8, 6, 5), -1
    values = data(shape, axis)
    fused = [(name, parameter) for f, name, parameter in FUSED if f is function]
    _, wanted = expected(values, axis, *(fused[0] if fused else ("sigmoid", 0.0)))
    actual = forward_and_gradients(
        layer_for(values, axis, activation=function), values["x"], values["dy"], None, MODES[-1]
    )
    assert_close(actual, wanted)
    plain = layer_for(values, axis)
    z = plain(values["x"].astype(np.float32), training=True)
    np.testing.assert_allclose(actual[0], as_arrays(function(z))[0], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("shape", "axis", "mask_shape"),
    [
        ((6, 9, 3), -1, (6, 9)),
        ((6, 9, 1), -1, (6, 9)),
        ((6, 3, 9), 1, (6, 3)),
        ((6, 3, 9), 1, (6, 1)),
        ((9, 3), -1, (9,)),
    ],
)
def test_masked_values_do_not_count(shape, axis, mask_shape):
    values = data(shape, axis, 100.0)
    mask = np.random.default_rng(1).uniform(size=mask_shape) < 0.6
    weights = np.broadcast_to(mask[..., None], shape).astype(np.float64)
    axes = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    keep = {"axis": axes, "keepdims": True}
    x, count = values["x"], weights.sum(**keep)
    mean = (x * weights).sum(**keep) / count
    var = ((x - mean) ** 2 * weights).sum(**keep) / count
    spread = [-1 if i == axis % len(shape) else 1 for i in range(len(shape))]
    gamma, beta = values["gamma"].reshape(spread), values["beta"].reshape(spread)
    inverse = 1.0 / np.sqrt(var + 1e-3)
    x_hat, dy = (x - mean) * inverse, values["dy"]
    dgamma, dbeta = (dy * x_hat).sum(**keep), dy.sum(**keep)
    dx = gamma * inverse * (dy - weights / count * (dbeta + x_hat * dgamma))
    wanted = [x_hat * gamma + beta, dx, dgamma.ravel(), dbeta.ravel()]
    values["x"] = np.where(weights > 0, x, np.nan)  # padding may be anything
    layer = layer_for(values, axis)
    actual = forward_and_gradients(layer, values["x"], values["dy"], mask, MODES[-1])
    moved = as_arrays(layer.moving_mean, layer.moving_variance)
    np.testing.assert_allclose(moved[0], 0.5 * mean.ravel(), rtol=1e-6)
    np.testing.assert_allclose(moved[1], 0.5 + 0.5 * var.ravel(), rtol=1e-5)
    counts = weights > 0
    actual[0], wanted[0] = actual[0] * counts, wanted[0] * counts
    # A padded NaN is treated as 0, whose distance from the mean enters the gradients.
    zero = np.where(counts, x, 0.0)
    x_hat = (zero - mean) * inverse
    dgamma = (dy * x_hat).sum(**keep)
    wanted[1] = counts * gamma * inverse * (dy - weights / count * (dbeta + x_hat * dgamma))
    wanted[2] = dgamma.ravel()
    if HAS_GRADIENTS:
        actual[1] = np.where(counts, actual[1], 0.0)
        scale = max(1.0, np.abs(x_hat).max())
        for got, true in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(got, true, rtol=0, atol=1e-6 * scale * max(np.abs(true).max(), 1.0))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_precision_is_that_of_the_dtype(policy):
    dtype = policy.removeprefix("mixed_")
    if BACKEND in ("jax", "numpy") and dtype == "float64":
        pytest.skip("JAX has float64 only if it is enabled, and Keras's operations in NumPy likewise")
    shape, axis = (32, 7, 6), -1
    values = data(shape, axis, 20.0, dtype)
    _, wanted = expected(values, axis)
    layer = layer_for(values, axis, dtype=policy)
    assert_close(forward_and_gradients(layer, values["x"], values["dy"], None, MODES[-1]), wanted, dtype)
    assert keras.backend.standardize_dtype(layer.moving_mean.dtype) == ("float64" if dtype == "float64" else "float32")


def test_renorm_equals_keras_layer():
    shape, axis = (8, 6, 5), -1
    values = data(shape, axis)
    results = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(renorm=True, renorm_clipping={"rmax": 1.1, "dmax": 0.2}, momentum=0.5, renorm_momentum=0.7)
        layer.build(shape)
        layer.gamma.assign(values["gamma"])
        layer.beta.assign(values["beta"])
        layer.renorm_mean.assign(np.linspace(-1, 1, 5))
        found = forward_and_gradients(layer, values["x"], values["dy"], None, MODES[0])
        results.append(found + as_arrays(*layer.non_trainable_variables))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, np.abs(theirs).max()))


def test_inference_is_exact_and_updates_nothing():
    shape, axis = (8, 5, 6), 1
    values = data(shape, axis, 100.0)
    layer = layer_for(values, axis)
    layer.moving_mean.assign(np.full(5, 100.0))
    layer.moving_variance.assign(np.linspace(0.5, 2.0, 5))
    before = as_arrays(*layer.weights)
    forward = reference.forward_inference(
        values["x"], before[2], before[3], before[0], before[1], eps=layer.epsilon, axis=axis
    )
    x = values["x"].astype(np.float32)
    assert_close(as_arrays(layer(x)), [forward.y])
    layer.trainable = False
    assert_close(as_arrays(layer(x, training=True)), [forward.y])
    for old, new in zip(before, as_arrays(*layer.weights), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere, derivatives are those of the operators")
def test_second_derivative_on_tensorflow():
    import tensorflow as tf

    values = data((6, 4), -1)
    layer = layer_for(values, -1, dtype="float64")

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(values["dy"] * layer(x, training=True) ** 3)
        return tape.gradient(loss, x)

    x, direction = tf.constant(values["x"]), np.random.default_rng(2).normal(size=(6, 4))
    for function in (gradient, tf.function(gradient)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            product = tf.reduce_sum(direction * function(x))
        second = tape.gradient(product, x).numpy()
        step = 1e-5
        difference = (gradient(x + step * direction) - gradient(x - step * direction)).numpy() / (2 * step)
        np.testing.assert_allclose(second, difference, rtol=1e-6, atol=1e-6 * np.abs(difference).max())
