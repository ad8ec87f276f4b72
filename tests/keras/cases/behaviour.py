"""Files, configuration, training, and batches on which Keras's own layer fails."""

from __future__ import annotations

import contextlib
import json

import keras
import numpy as np
import pytest
from keras import layers, ops

from batchnorm.keras import BatchNormalization
from tests.keras.cases.derivatives import BACKEND, HAS_GRADIENTS, as_arrays

OBJECTS = {"batchnorm>BatchNormalization": layers.BatchNormalization}


def network(kind: type, **options: object) -> keras.Model:
    first = kind(momentum=0.5, **options)
    inputs = keras.Input((6, 4))
    return keras.Model(inputs, layers.Dense(2)(kind(axis=1, scale=False)(first(layers.Dense(3)(inputs)))))


def perturbed(model: keras.Model) -> keras.Model:
    rng = np.random.default_rng(3)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
    return model


@pytest.mark.parametrize("options", [{}, {"renorm": True}])
def test_layer_is_keras_layer_except_for_its_computation(options):
    ours, theirs = network(BatchNormalization, **options), network(layers.BatchNormalization, **options)
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        ours_name, theirs_name = (name.rstrip("_0123456789") for name in (a.name, b.name))
        assert ours_name == theirs_name
        assert [w.name for w in a.weights] == [w.name for w in b.weights]
        assert [w.shape for w in a.weights] == [w.shape for w in b.weights]
        assert [w.dtype for w in a.weights] == [w.dtype for w in b.weights]
    config = ours.layers[2].get_config()
    assert config == {**theirs.layers[2].get_config(), "name": config["name"]}
    json.dumps(config)
    assert layers.BatchNormalization.from_config(config).get_config() == config
    assert BatchNormalization.from_config(config).get_config() == config


def test_config_keeps_the_arguments_that_keras_layer_lacks():
    layer = BatchNormalization(activation="leaky_relu", on_nonfinite="skip", on_single="running")
    config = layer.get_config()
    assert (config["activation"], config["on_nonfinite"]) == ("leaky_relu", "skip")
    again = BatchNormalization.from_config(json.loads(json.dumps(config)))
    assert again.activation is keras.activations.leaky_relu
    assert (again.on_nonfinite, again.on_single) == ("skip", "running")


@pytest.mark.parametrize("options", [{}, {"renorm": True}])
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras", ".h5"])
@pytest.mark.parametrize("first", [BatchNormalization, layers.BatchNormalization])
def test_weight_files_are_keras_layers(tmp_path, suffix, first, options):
    second = layers.BatchNormalization if first is BatchNormalization else BatchNormalization
    model = perturbed(network(first, **options))
    path = tmp_path / f"model{suffix}"
    model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
    other = perturbed(network(second, **options))
    other.set_weights([w * 0 for w in other.get_weights()])
    other.load_weights(path)
    for written, read in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(written, read)
    x = np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(*as_arrays(model(x), other(x)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_model_files_load_as_either_layer(tmp_path, monkeypatch, suffix):
    model = perturbed(network(BatchNormalization))
    path = tmp_path / f"model{suffix}"
    model.save(path)
    ours = keras.models.load_model(path)
    # As where this library is not imported.
    monkeypatch.delitem(keras.saving.get_custom_objects(), "batchnorm>BatchNormalization")
    theirs = keras.models.load_model(path, custom_objects=OBJECTS)
    x = np.random.default_rng(4).normal(size=(5, 6, 4)).astype(np.float32)
    for loaded, kind in ((ours, BatchNormalization), (theirs, layers.BatchNormalization)):
        assert type(loaded.layers[2]) is kind
        np.testing.assert_allclose(*as_arrays(model(x), loaded(x)), rtol=0, atol=2e-6)


def test_no_value_counts_in_an_empty_batch_or_a_full_mask():
    layer = BatchNormalization()
    layer.build((None, 6, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    before = as_arrays(layer.moving_mean, layer.moving_variance)
    assert layer(np.zeros((0, 6, 3), np.float32), training=True).shape == (0, 6, 3)
    y = layer(np.ones((2, 6, 3), np.float32), training=True, mask=np.zeros((2, 6), bool))
    assert np.isfinite(as_arrays(y)[0]).all()
    for old, new in zip(before, as_arrays(layer.moving_mean, layer.moving_variance), strict=True):
        np.testing.assert_array_equal(old, new)


def test_one_value_per_channel_gives_beta():
    layer = BatchNormalization(momentum=0.5)
    layer.build((None, 3))
    layer.beta.assign([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(as_arrays(layer(np.full((1, 3), 7.0), training=True))[0], [[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(as_arrays(layer.moving_mean)[0], [3.5] * 3)
    np.testing.assert_array_equal(as_arrays(layer.moving_variance)[0], [0.5] * 3)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("mask", [None, [[True, False]], [[False, False]]])
def test_one_value_is_normalized_by_the_moving_statistics_on_request(mask, renorm):
    layer = BatchNormalization(activation="relu", on_single="running", renorm=renorm)
    x = np.full((1, 1 if mask is None else 2, 3), 7.0, np.float32)
    if mask is not None:
        mask = np.array(mask)
        x[~mask] = np.nan
    layer.build(x.shape)
    rng = np.random.default_rng(4)
    layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    before = layer.get_weights()
    y = as_arrays(layer(x, training=True, mask=mask))[0]
    np.testing.assert_array_equal(y, as_arrays(layer(np.nan_to_num(x), training=False))[0])
    for old, new in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_only_channels_with_one_value_are_normalized_by_the_moving_statistics():
    x = np.random.default_rng(8).normal(size=(2, 3, 1)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])  # the channels are in axis 1: 2, 1 and 0 values
    running, batch = (BatchNormalization(axis=1, on_single=name) for name in ("running", "batch"))
    y, by_batch = (as_arrays(layer(x, training=True, mask=mask))[0] for layer in (running, batch))
    by_moving = as_arrays(BatchNormalization(axis=1)(x, training=False))[0]
    np.testing.assert_array_equal(y[:, :1], by_batch[:, :1])
    np.testing.assert_array_equal(y[:, 1:], by_moving[:, 1:])
    for name, start in (("moving_mean", 0.0), ("moving_variance", 1.0)):
        now, expected = as_arrays(getattr(running, name), getattr(batch, name))
        np.testing.assert_array_equal(now, [expected[0], start, start])


@pytest.mark.skipif(not HAS_GRADIENTS, reason="the backend cannot train")
def test_the_last_batch_of_an_epoch_may_have_one_sample():
    x = np.random.default_rng(9).normal(size=(5, 3)).astype(np.float32)
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(momentum=0.5, on_single="running")])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, np.zeros_like(x), batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_allclose(as_arrays(model.layers[0].moving_mean)[0], x[:4].mean(0) / 2, rtol=0, atol=1e-6)


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_batch_is_skipped_on_request(value, renorm):
    x = np.ones((4, 3), np.float32)
    x[1, 2] = value
    skips = BatchNormalization(on_nonfinite="skip", renorm=renorm)
    propagates = BatchNormalization(renorm=renorm)
    for layer in (skips, propagates):
        layer.build(x.shape)
    before = as_arrays(*skips.non_trainable_variables)
    with np.errstate(invalid="ignore"):
        skips(x, training=True)
        propagates(x, training=True)
    for old, new in zip(before, as_arrays(*skips.non_trainable_variables), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.isnan(as_arrays(propagates.moving_variance)[0]).any()
    skips(np.ones((4, 3), np.float32), training=True)
    assert not np.array_equal(
        as_arrays(skips.moving_mean)[0], before[skips.non_trainable_variables.index(skips.moving_mean)]
    )


@pytest.mark.parametrize(("value", "cause"), [(np.nan, "x has NaN or infinity"), (1e30, "its variance overflows")])
def test_nonfinite_batch_raises_an_error_on_request(value, cause):
    x = np.ones((4, 3), np.float32)
    x[1, 2] = value
    layer = BatchNormalization(on_nonfinite="error")
    layer.build(x.shape)
    message = rf"expects finite statistics .* in 1 of 3 channels \(2\)\. .*{cause}"
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(FloatingPointError, match=message):
        layer(x, training=True)
    np.testing.assert_array_equal(as_arrays(layer.moving_mean)[0], np.zeros(3))
    layer(np.ones((4, 3), np.float32), training=True)
    assert as_arrays(layer.moving_mean)[0].all()


@pytest.mark.skipif(not HAS_GRADIENTS, reason="the backend cannot train")
def test_nonfinite_batch_is_an_error_in_eager_steps_only():
    x = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)
    for eager in (True, False):
        model = keras.Sequential([keras.Input((3,)), BatchNormalization(on_nonfinite="error")])
        model.compile("sgd", "mse", run_eagerly=eager)
        graph = not eager and keras.backend.backend() != "torch"
        refusal = pytest.raises(ValueError, match="compiled training step, got 'error', .* run_eagerly=True")
        with refusal if graph else contextlib.nullcontext():
            model.fit(x, x, verbose=0)


def test_epsilon_may_be_zero_as_in_keras_layer():
    x = np.random.default_rng(5).normal(size=(8, 3)).astype(np.float32)
    layer = BatchNormalization(epsilon=0.0)
    y = as_arrays(layer(x, training=True))[0]
    np.testing.assert_allclose(y, (x - x.mean(0)) / x.std(0), rtol=0, atol=2e-6)
    assert np.isfinite(as_arrays(layer(x))[0]).all()


def test_integers_are_normalized_as_floats():
    x = np.arange(12, dtype=np.int32).reshape(4, 3)
    y = as_arrays(BatchNormalization()(x, training=True))[0]
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), rtol=0, atol=1e-6)


# On JAX, jit_compile=False and run_eagerly=True are the same, and each size of a batch takes seconds.
_SETTINGS = [({}, 20), ({"run_eagerly": True}, 24)]
if keras.backend.backend() != "jax":
    _SETTINGS.append(({"jit_compile": False}, 20))


@pytest.mark.parametrize(("settings", "batch_size"), _SETTINGS)
@pytest.mark.skipif(not HAS_GRADIENTS, reason="the backend cannot train")
def test_fit_trains_as_with_keras_layer(settings, batch_size):
    rng = np.random.default_rng(6)
    x, target = rng.normal(size=(48, 6, 4)).astype(np.float32), rng.normal(size=(48, 6, 2)).astype(np.float32)
    losses, weights = [], []
    for kind in (BatchNormalization, layers.BatchNormalization):
        model = perturbed(network(kind))
        model.compile(keras.optimizers.SGD(0.05), "mse", **settings)
        history = model.fit(x, target, batch_size=batch_size, epochs=2, shuffle=False, verbose=0)
        losses.append(history.history["loss"])
        weights.append(model.get_weights())
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for ours, theirs in zip(*weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_predict_uses_the_moving_statistics():
    model = perturbed(network(BatchNormalization))
    x = np.random.default_rng(7).normal(size=(5, 6, 4)).astype(np.float32)
    np.testing.assert_allclose(model.predict(x, verbose=0), as_arrays(model(x, training=False))[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, "expects on_nonfinite to be one of 'propagate', 'skip', 'error', got 'ignore'"),
        ({"on_single": "error"}, "expects on_single to be one of 'batch', 'running', got 'error'. Choose one"),
        ({"activation": "no such function"}, "activation"),
        ({"momentum": float("nan")}, r"BatchNormalization expects momentum in \[0, 1\], got nan. It is the weight"),
        ({"epsilon": -1.0}, "BatchNormalization expects epsilon > 0, got -1.0. It keeps"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNormalization(**options)
    layer = BatchNormalization()
    for name, value in options.items():
        if name != "activation":  # a function
            with pytest.raises(ValueError, match=message):
                setattr(layer, name, value)


def test_invalid_inputs_are_refused():
    layer = BatchNormalization()
    with pytest.raises(ValueError, match=r"at least two dimensions, got the shape \(3,\). Add an axis"):
        layer.build((3,))
    with pytest.raises(ValueError, match=r"axis to be one of inputs of shape \(4, 3\), got 2. Pass the axis"):
        BatchNormalization(axis=2).build((4, 3))
    with pytest.raises(ValueError, match=r"broadcasts to \(4, 2\), got one of shape \(4, 3\). Each size must be 1"):
        BatchNormalization()(ops.ones((4, 2, 3)), training=True, mask=ops.ones((4, 3)))
    with pytest.raises(ValueError, match=r"broadcasts to \(4, 2\)\), got one of shape \(4,\)"):
        BatchNormalization()(ops.ones((4, 2, 3)), training=True, mask=ops.ones((4,)))


@pytest.mark.skipif(BACKEND != "numpy", reason="the backend can synchronize")
def test_synchronization_is_refused_where_there_is_one_device():
    with pytest.raises(ValueError, match="expects synchronized=False on .*, got True with the numpy backend. Use"):
        BatchNormalization(synchronized=True)
