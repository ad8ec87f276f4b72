"""The layers for Flax against the stock layers, and where they differ on purpose."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

jax = pytest.importorskip("jax")
flax = pytest.importorskip("flax")
jnp = jax.numpy

from flax import linen as stock_linen  # noqa: E402
from flax import nnx as stock_nnx  # noqa: E402
from jax.experimental import checkify  # noqa: E402

from batchnorm.jax import batch_norm, linen, nnx  # noqa: E402

pytestmark = pytest.mark.usefixtures("unoptimized_by_xla")
OPTIONS: dict[str, Any] = {"momentum": 0.7, "epsilon": 1e-3, "use_fast_variance": False}
STOCK_ERROR = 2.0**-18  # of the stock layers, for values of this size


def x_of(shape: tuple[int, ...] = (6, 5, 4), dtype: Any = "float32", seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) + 2.0, dtype)


class Nnx:
    """An NNX layer behind the interface that both layers share in these tests."""

    ours, stock = nnx.BatchNorm, stock_nnx.BatchNorm

    def __init__(self, layer: Any, channels: int = 4, **options: Any) -> None:
        self.layer = layer(channels, rngs=stock_nnx.Rngs(0), **OPTIONS | options)

    def __call__(self, x: Any, training: bool = True, **arguments: Any) -> Any:
        return self.layer(x, not training, **arguments)

    @property
    def running(self) -> list[Any]:
        return [self.layer.mean[...], self.layer.var[...]]

    def state(self) -> Any:
        return stock_nnx.state(self.layer)

    def load(self, state: Any) -> None:
        stock_nnx.update(self.layer, state)


class Linen:
    """A Linen layer in the same way."""

    ours, stock = linen.BatchNorm, stock_linen.BatchNorm

    def __init__(self, layer: Any, channels: int = 4, **options: Any) -> None:
        self.layer = layer(**OPTIONS | options)
        self.variables = self.layer.init(
            jax.random.key(0), jnp.ones((1, channels, channels)), use_running_average=False
        )

    def __call__(self, x: Any, training: bool = True, **arguments: Any) -> Any:
        y, updated = self.layer.apply(
            self.variables, x, use_running_average=not training, mutable=["batch_stats"], **arguments
        )
        self.variables = {**self.variables, **updated}
        return y

    @property
    def running(self) -> list[Any]:
        return [self.variables["batch_stats"][name] for name in ("mean", "var")]

    def state(self) -> Any:
        return self.variables

    def load(self, state: Any) -> None:
        self.variables = state


APIS = pytest.mark.parametrize("api", [Nnx, Linen])


@APIS
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_training_and_evaluation_are_those_of_the_stock_layer(api: Any, axis: int, masked: bool) -> None:
    ours, stock = (api(layer, 5 if axis == 1 else 4, axis=axis) for layer in (api.ours, api.stock))
    x = x_of()
    mask = np.random.default_rng(1).random((6, 1, 4) if axis == 1 else (6, 5, 1)) > 0.3
    arguments = {"mask": jnp.asarray(mask)} if masked else {}
    assert_allclose(ours(x, **arguments), stock(x, **arguments), atol=STOCK_ERROR)
    assert_allclose(ours.running, stock.running, atol=1e-6)
    assert_allclose(ours(x, training=False), stock(x, training=False), atol=STOCK_ERROR)


@APIS
@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {}, {"use_bias": False}, {"use_scale": False}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_and_the_parameters_are_those_of_the_stock_layer(api: Any, options: Any, dtype: str) -> None:
    ours, stock = api(api.ours, **options), api(api.stock, **options)
    assert jax.tree.structure(ours.state()) == jax.tree.structure(stock.state())
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours.state()) == jax.tree.map(
        lambda a: (a.shape, a.dtype), stock.state()
    )
    for training in (True, False):
        y, expected = (layer(x_of(dtype=dtype), training=training) for layer in (ours, stock))
        assert y.dtype == expected.dtype
        assert_allclose(y.astype("float32"), expected.astype("float32"), atol=0.03 if y.dtype == "bfloat16" else 2e-6)


@APIS
@pytest.mark.parametrize("forth", [True, False])
def test_a_checkpoint_loads_in_both_directions(api: Any, forth: bool) -> None:
    serialization = flax.serialization
    source, target = (api(layer) for layer in ((api.ours, api.stock) if forth else (api.stock, api.ours)))
    for seed in range(3):
        source(x_of(seed=seed))
    pure = stock_nnx.to_pure_dict if api is Nnx else lambda state: state
    saved = serialization.to_bytes(pure(source.state()))
    restored = serialization.from_bytes(pure(target.state()), saved)
    if api is Nnx:
        state = target.state()
        stock_nnx.replace_by_pure_dict(state, restored)
        restored = state
    target.load(restored)
    assert_array_equal(target.running, source.running)
    assert_allclose(target(x_of(), training=False), source(x_of(), training=False), atol=STOCK_ERROR)


@APIS
def test_the_fused_call_is_normalization_then_sum_then_activation(api: Any) -> None:
    ours, stock = api(api.ours, activation="leaky_relu", negative_slope=0.3), api(api.stock)
    x, residual = x_of(), x_of(seed=1)
    for training in (True, False):
        expected = jax.nn.leaky_relu(stock(x, training=training) + residual, 0.3)
        assert_allclose(ours(x, training=training, residual=residual), expected, atol=STOCK_ERROR)


@APIS
def test_statistics_lose_no_digits_in_a_short_dtype(api: Any) -> None:
    layer = api(api.ours, dtype=jnp.bfloat16)
    x = x_of((64, 9, 4)) + 1e3
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1)), exact.var((0, 1))
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert_allclose(y.astype("float32"), (exact - mean) / np.sqrt(var + 1e-3), atol=0.03)
    assert_allclose(layer.running, (0.3 * mean, 0.7 + 0.3 * var), rtol=1e-6)


@APIS
def test_statistics_lose_no_digits_at_a_large_mean(api: Any) -> None:
    layer = api(api.ours)
    x = x_of((64, 9, 4)) + 1e4
    exact = np.asarray(x, np.float64)
    mean, var = exact.mean((0, 1)), exact.var((0, 1))
    assert_allclose(layer(x), (exact - mean) / np.sqrt(var + 1e-3), atol=STOCK_ERROR)
    assert_allclose(layer.running[1], 0.7 + 0.3 * var, rtol=1e-6)


@APIS
def test_a_batch_that_is_not_finite_is_skipped_if_asked(api: Any) -> None:
    x = x_of().at[0, 0, 0].set(jnp.nan)
    skips, propagates = api(api.ours, on_nonfinite="skip"), api(api.ours)
    before = [np.asarray(a) for a in skips.running]
    assert jnp.isnan(skips(x)).any() and jnp.isnan(propagates(x)).any()
    assert_array_equal(skips.running, before)
    assert jnp.isnan(propagates.running[0][0]) and not jnp.isnan(propagates.running[0][1])
    skips(x_of())
    assert not np.array_equal(skips.running, before)


@APIS
@pytest.mark.parametrize(("value", "cause"), [(jnp.nan, "x has NaN or infinity"), (1e30, "its variance overflows")])
def test_a_batch_that_is_not_finite_raises_an_error_if_asked(api: Any, value: float, cause: str) -> None:
    layer = api(api.ours, on_nonfinite="error")
    before = [np.asarray(a) for a in layer.running]
    with pytest.raises(FloatingPointError, match=rf"expects finite statistics .* in 1 of 4 channels \(2\)\. .*{cause}"):
        layer(x_of().at[0, 0, 2].set(value))
    assert_array_equal(layer.running, before)
    layer(x_of())
    assert not np.array_equal(layer.running, before)


def test_checkify_reports_batches_that_are_not_finite() -> None:
    layer = linen.BatchNorm(use_running_average=False, on_nonfinite="error")
    variables = layer.init(jax.random.key(0), x_of())

    def step(x: Any) -> Any:
        return layer.apply(variables, x, mutable=["batch_stats"])

    checked = jax.jit(checkify.checkify(step))
    assert checked(x_of())[0].get() is None
    assert "expects finite statistics" in checked(x_of().at[0, 0, 2].set(jnp.inf))[0].get()
    with pytest.raises(ValueError, match=r"checkify\.check which was not functionalized"):
        jax.jit(step)(x_of())


@APIS
@pytest.mark.parametrize("empty", [True, False], ids=["no samples", "nothing counts"])
def test_a_batch_without_values_leaves_the_running_statistics(api: Any, empty: bool) -> None:
    layer = api(api.ours)
    before = [np.asarray(a) for a in layer.running]
    y = layer(x_of((0, 5, 4))) if empty else layer(x_of(), mask=jnp.zeros((6, 5, 1), bool))
    assert y.shape == ((0, 5, 4) if empty else (6, 5, 4)) and jnp.isfinite(y).all()
    assert_array_equal(layer.running, before)


@APIS
def test_one_value_per_channel_is_an_error_in_training(api: Any) -> None:
    layer = api(api.ours)
    with pytest.raises(ValueError, match="BatchNorm expects more than 1 value .* use a larger batch, on_single='run"):
        layer(x_of((1, 1, 4)))
    assert layer(x_of((1, 1, 4)), training=False).shape == (1, 1, 4)


@APIS
def test_one_value_per_channel_is_normalized_by_the_running_statistics_if_asked(api: Any) -> None:
    layer, plain = api(api.ours, on_single="running", activation="relu"), api(api.ours, activation="relu")
    for x in (x_of(), x_of((1, 2, 4))):
        assert_array_equal(layer(x), plain(x))
    before = [np.asarray(a) for a in layer.running]
    x = x_of((1, 1, 4), seed=2)
    assert_array_equal(layer(x), plain(x, training=False))
    assert_array_equal(layer.running, before)


@APIS
@pytest.mark.parametrize("per_channel", [False, True], ids=["positions", "channels"])
def test_at_most_one_unmasked_value_is_normalized_by_the_running_statistics_if_asked(
    api: Any, per_channel: bool
) -> None:
    counts = jnp.array([True, False] if per_channel else [True, True])  # the channels with one value, or with none
    mask = jnp.zeros((3, 2, 2), bool).at[1, 0].set(counts) | ~counts
    x = x_of((3, 2, 2)).at[0, 0, 0].set(jnp.nan)  # masked
    layer, plain = (api(api.ours, 2, **options) for options in ({"on_single": "running"}, {}))
    before = [np.asarray(a) for a in layer.running]
    y, by_batch = layer(x, mask=mask), plain(x, mask=mask)
    by_running = api(api.ours, 2)(jnp.where(mask, x, jnp.nan_to_num(x)), training=False)
    assert_array_equal(y, jnp.where(counts, by_running, by_batch))
    for now, old, moved in zip(layer.running, before, plain.running, strict=True):
        assert_array_equal(now, jnp.where(counts, old, moved))

    def loss(x: Any) -> Any:
        return (nnx.BatchNorm(2, on_single="running", rngs=stock_nnx.Rngs(0))(x, False, mask=mask) ** 2).sum()

    assert jnp.isfinite(jax.grad(loss)(jnp.nan_to_num(x))).all()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_single_value_over_all_devices_is_what_counts(devices: int) -> None:
    x, variables = (
        x_of((devices, 1, 4)),
        linen.BatchNorm(use_running_average=False).init(jax.random.key(0), x_of((1, 4))),
    )

    def step(x: Any, mask: Any) -> Any:
        layer = linen.BatchNorm(use_running_average=False, axis_name="d", on_single="running")
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    for mask in (None, jnp.ones((devices, 1, 1), bool)):
        y, updated = jax.vmap(step, axis_name="d", in_axes=(0, None if mask is None else 0))(x, mask)
        by_running = linen.BatchNorm(use_running_average=True).apply(variables, x)
        assert np.array_equal(y, by_running) == (devices == 1)
        assert np.array_equal(updated["batch_stats"]["mean"], np.zeros((devices, 4))) == (devices == 1)


def test_linen_is_initialized_by_a_single_sample() -> None:
    variables = linen.BatchNorm(use_running_average=False).init(jax.random.key(0), jnp.ones((1, 3)))
    assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))


@APIS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "selu"}, r"BatchNorm expects activation to be one of .*, got 'selu'"),
        ({"on_nonfinite": "ignore"}, "expects on_nonfinite to be one of 'propagate', 'skip', 'error', got 'ignore'"),
        ({"on_single": "batch"}, r"BatchNorm expects on_single to be one of 'error', 'running', got 'batch'"),
        ({"momentum": math.nan}, r"BatchNorm expects momentum in \[0, 1\], got nan. It is the weight of the old"),
        ({"epsilon": -1.0}, r"BatchNorm expects epsilon > 0, got -1.0. It keeps"),
        ({"axis": (1, 2)}, r"BatchNorm expects axis to be one axis of channels, got \(1, 2\). Reshape x"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_invalid_options_say_what_to_do(api: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api(api.ours, **options)


def test_an_attribute_of_nnx_out_of_range_is_an_error_in_the_next_call() -> None:
    layer = nnx.BatchNorm(4, rngs=stock_nnx.Rngs(0))
    layer.momentum = math.nan
    with pytest.raises(ValueError, match=r"BatchNorm expects momentum in \[0, 1\], got nan."):
        layer(x_of())
    assert_array_equal(layer.mean[...], np.zeros(4))


@APIS
def test_the_axis_may_be_an_integer_of_numpy_and_must_be_one_of_x(api: Any) -> None:
    assert api(api.ours, 5, axis=np.int64(1))(x_of()).shape == (6, 5, 4)
    with pytest.raises(ValueError, match="BatchNorm expects axis from -3 to 2 for x of shape .*, got 7. Pass the axis"):
        api(api.ours, 5, axis=7)(x_of())


def test_nnx_without_a_mode_says_where_to_pass_it() -> None:
    with pytest.raises(ValueError, match="expects use_running_average in the constructor or in the call, got None"):
        nnx.BatchNorm(4, use_running_average=None, rngs=stock_nnx.Rngs(0))(x_of())


def test_nnx_trains_under_jit_and_grad() -> None:
    layer = nnx.BatchNorm(4, rngs=stock_nnx.Rngs(0), activation="relu", **OPTIONS)

    @stock_nnx.jit
    def step(layer: Any, x: Any) -> Any:
        return stock_nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)

    gradients = step(layer, x_of())
    _, pull = jax.vjp(lambda w: batch_norm(x_of(), w, jnp.zeros(4), eps=1e-3, activation="relu")[0], jnp.ones(4))
    y = batch_norm(x_of(), jnp.ones(4), jnp.zeros(4), eps=1e-3, activation="relu")[0]
    assert_allclose(gradients["scale"][...], pull(2 * y)[0], rtol=1e-5)
    assert_allclose(layer.mean[...], 0.3 * x_of().mean((0, 1)), rtol=1e-6)
    layer.eval()
    assert layer.use_running_average
