"""Cases of `recalibrate`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import recalibration
from batchnorm.keras.models.layers import as_numpy, norm_layers
from batchnorm.keras.recalibration import recalibrate
from tests.keras.verbs.models import assert_unchanged, normal, sequential, subclassed, weights

X = normal(50, 6, 3) * 3.0 + 100.0


def network() -> Any:
    return sequential(
        layers.Conv1D(4, 3), layers.BatchNormalization(name="first"), layers.ReLU(), layers.Dropout(0.5),
        layers.BatchNormalization(axis=1, renorm=True, name="second"), layers.Flatten(), layers.Dense(2),
        shape=(6, 3),
    )  # fmt: skip


def first_input(model: Any) -> Any:
    """Return the input of the first batch normalization, in float64."""
    kernel, bias = (as_numpy(variable).astype(np.float64) for variable in model.layers[0].weights)
    windows = np.stack([X[:, i : i + 4].astype(np.float64) for i in range(3)])  # [tap, sample, position, channel]
    return np.einsum("knpc,kco->npo", windows, kernel) + bias


class Dataset(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        part = X[10 * index : 10 * index + 10]
        return part, np.zeros(len(part))


def data_of(kind: str) -> Any:
    if kind == "tf.data":
        tensorflow = pytest.importorskip("tensorflow")
        return tensorflow.data.Dataset.from_tensor_slices((X, np.zeros(50))).batch(10)
    if kind == "torch loader":
        data = pytest.importorskip("torch.utils.data")
        torch = pytest.importorskip("torch")
        return data.DataLoader(data.TensorDataset(torch.from_numpy(X), torch.zeros(50)), 10)
    parts = [X[i : i + 10] for i in range(0, 50, 10)]
    return {"array": X, "list": parts, "generator": iter(parts), "PyDataset": Dataset()}[kind]


@pytest.mark.parametrize("kind", ["array", "list", "generator", "PyDataset", "torch loader", "tf.data"])
def test_recalibrate_sets_the_population_statistics_from_any_data(kind: str) -> None:
    model = network()
    before = weights(model)
    new, report = recalibrate(model, data_of(kind), batch_size=10)
    assert (report.batches, report.samples) == (5, 50) and len(report.changed) == 2
    exact = first_input(model)
    layer = new.get_layer("first")
    mean, var = exact.mean((0, 1)), exact.var((0, 1))
    assert np.abs(as_numpy(layer.moving_mean) - mean).max() <= 1e-6 * np.abs(mean).max()
    assert np.abs(as_numpy(layer.moving_variance) / var - 1).max() <= 1e-4  # the convolution's error at this mean
    assert np.array_equal(report["first"].mean.astype(np.float32), as_numpy(layer.moving_mean))
    assert_unchanged(before, model)


def test_recalibrate_normalizes_each_batch_by_its_own_statistics() -> None:
    model = network()
    once, thrice = (recalibrate(model, data).report for data in ([X], [X, X, X]))
    for name in ("first", "second"):
        assert np.allclose(once[name].mean, thrice[name].mean, rtol=1e-12)
        assert np.allclose(once[name].var, thrice[name].var, rtol=1e-12)
    apart = recalibrate(model, [X[:25], X[25:] + 50.0]).report
    both = np.concatenate([first_input(model)[:25], first_input(model)[25:]])
    assert (apart["first"].var > 2 * both.var((0, 1))).all()  # the deviations between the batches count


def test_recalibrate_updates_the_deviation_that_renorm_continues_from() -> None:
    layer = recalibrate(network(), X).model.get_layer("second")
    expected = np.sqrt(as_numpy(layer.moving_variance).astype(np.float64) + layer.epsilon)
    for name in ("moving_stddev", "renorm_stddev"):
        assert np.allclose(as_numpy(getattr(layer, name)), expected, rtol=1e-6)


def test_recalibrate_in_sequential_passes_gives_the_statistics_of_evaluation() -> None:
    model = network()
    parts = (X[i : i + 3] for i in range(0, 50, 3))  # the last batch has two samples
    new, report = recalibrate(model, parts, passes="sequential")
    assert (report.passes, report.batches, report.samples) == ("sequential", 17, 50)
    first, second = (new.get_layer(name) for name in ("first", "second"))
    between = keras.Model(new.inputs, [first.output, second.input])
    y, z = (as_numpy(value).astype(np.float64) for value in between(X, training=False))
    assert np.abs(y.mean((0, 1)) - as_numpy(first.beta)).max() < 1e-5  # the mean of y is β if its mean is the data's
    assert np.allclose(as_numpy(second.moving_mean), z.mean((0, 2)), rtol=1e-5)
    assert np.allclose(as_numpy(second.moving_variance), z.var((0, 2)), rtol=1e-5)
    single = recalibrate(model, X, batch_size=3).report
    assert not np.allclose(single["second"].var, report["second"].var, rtol=1e-3)


def test_recalibrate_in_sequential_passes_takes_single_values_shared_layers_and_python_code() -> None:
    norm = layers.BatchNormalization(name="norm")
    x = keras.Input((3,))
    shared = keras.Model(x, norm(norm(x) + 1.0))
    data = normal(40, 3)
    report = recalibrate(shared, data, batch_size=1, passes="sequential").report
    assert len(report["norm"].calls) == 2
    assert np.allclose(report["norm"].calls[0][0].mean, data.astype(np.float64).mean(0), atol=1e-6)
    model = subclassed()
    before = weights(model)
    report = recalibrate(model, data_of_four := normal(9, 4), passes="sequential").report
    assert [change.path for change in report.changed] == [found.path for found in norm_layers(model)]
    assert_unchanged(before, model)
    with pytest.raises(ValueError, match="passes to be one of 'single', 'sequential', got 'both'"):
        recalibrate(model, data_of_four, passes="both")


def test_recalibrate_errors_have_no_text_of_keras() -> None:
    for model, data in ((network(), X[:2]), (subclassed(), normal(2, 4))):
        for values, shown in ((np.nan, "for NaN and overflow."), (np.inf, "for NaN and overflow.")):
            with pytest.raises(ValueError, match="^recalibrate expects finite values") as caught:
                recalibrate(model, [np.full_like(data, values)])
            assert str(caught.value).endswith(shown)


def test_recalibrate_pools_the_calls_of_a_shared_layer() -> None:
    norm = layers.BatchNormalization(name="norm")
    x = keras.Input((3,))
    model = keras.Model(x, norm(x) + norm(x * 3.0))
    data = normal(40, 3)
    report = recalibrate(model, data, batch_size=40).report
    assert len(report["norm"].calls) == 2 and "called 2 times" in report.changed[0].reason
    both = np.concatenate([data, data * np.float32(3)]).astype(np.float64)
    assert np.allclose(report["norm"].var, both.var(0), rtol=1e-6)


def test_recalibrate_respects_masks() -> None:
    tokens = np.array([[1, 2, 3, 0], [4, 5, 0, 0]])
    model = sequential(layers.Embedding(6, 3, mask_zero=True), layers.BatchNormalization(name="norm"), shape=(4,))
    table = as_numpy(model.layers[0].embeddings).astype(np.float64)
    report = recalibrate(model, [tokens]).report
    assert report["norm"].moments[0].count == 5
    assert np.allclose(report["norm"].mean, table[1:].mean(0), rtol=1e-6)


def test_recalibrate_prior_blends_with_the_former_statistics() -> None:
    model = sequential(layers.BatchNormalization(name="norm"), shape=(3,))
    data = normal(30, 3)
    report = recalibrate(model, data, prior=60, batch_size=30).report
    former = as_numpy(model.layers[0].moving_mean).astype(np.float64)
    assert np.allclose(report["norm"].mean, (60 * former + 30 * data.astype(np.float64).mean(0)) / 90, rtol=1e-6)


def test_recalibrate_leaves_frozen_and_unnamed_layers_and_those_not_reached() -> None:
    model = network()
    model.get_layer("first").trainable = False
    new, report = recalibrate(model, X)
    assert [change.reason for change in report.left] == ["frozen"]
    assert np.array_equal(as_numpy(new.get_layer("first").moving_mean), as_numpy(model.get_layer("first").moving_mean))
    assert [change.path for change in recalibrate(model, X, only="first").report.changed] == ["first"]
    with pytest.raises(ValueError, match="reach the selected layers"):
        recalibrate(model, X, forward=lambda model, batch: None)


@pytest.mark.parametrize("make", [network, subclassed])
def test_recalibrate_after_an_error_the_model_is_as_before(make: Any) -> None:
    model = make()
    before = weights(model)
    shape = (6, 3) if make is network else (4,)

    def data() -> Any:
        yield normal(8, *shape)
        raise RuntimeError("the data end here")

    with pytest.raises(RuntimeError, match="the data end here"):
        recalibrate(model, data(), inplace=True)
    assert_unchanged(before, model)
    assert not any("call" in vars(found.module) for found in norm_layers(model))
    assert recalibrate(model, normal(8, *shape), inplace=True).model is model


def test_recalibrate_an_interrupted_write_changes_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = weights(model)

    def interrupted(layer: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recalibration, "start_renorm", interrupted)  # of the second layer
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, X, inplace=True)
    assert_unchanged(before, model)


def test_recalibrate_a_subclass_whose_call_has_no_training() -> None:
    class Evaluated(layers.BatchNormalization):
        def call(self, inputs: Any) -> Any:
            return super().call(inputs, training=False)

    report = recalibrate(sequential(Evaluated(name="norm"), shape=(6, 3)), X).report
    assert np.allclose(report["norm"].mean, X.astype(np.float64).mean((0, 1)), rtol=1e-12)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="predict is not compiled")
def test_recalibrate_refuses_a_forward_that_compiles() -> None:
    model = network()
    before = weights(model)
    with pytest.raises(TypeError, match="an input with values, got .*Tracer|an input with values, got SymbolicTensor"):
        recalibrate(model, X, forward=lambda model, x: model.predict(x, verbose=0), inplace=True)
    assert_unchanged(before, model)
    assert model.predict(X[:4], verbose=0).shape == (4, 2)


def test_recalibrate_refuses_statistics_beyond_the_dtype_of_the_variables() -> None:
    model = sequential(layers.BatchNormalization(dtype="float16", name="norm"), shape=(3,))
    before = weights(model)
    with pytest.raises(ValueError, match="a variance that is not finite in float16 at 'norm'. Check"):
        recalibrate(model, normal(8, 3) * np.float32(1e3), inplace=True)
    assert_unchanged(before, model)


def test_recalibrate_refuses_what_it_cannot_use() -> None:
    model = network()
    for arguments, message in (
        ({"data": X, "batch_size": 2.5}, "batch_size to be an int, got 2.5"),
        ({"data": X, "max_samples": 0.5}, "max_samples to be an int, got 0.5"),
        ({"data": [()]}, "batches of arrays .*, got tuple without any. Pass"),
        ({"data": {}}, "batches of arrays .*, got dict without any. Pass"),
        ({"data": np.float32(3)}, "batches of arrays .*, got float32 without any. Pass"),
    ):
        with pytest.raises(TypeError, match=message):
            recalibrate(model, **arguments)
    for arguments, message in (
        ({"data": []}, "at least one batch"),
        ({"data": [np.full((2, 6, 3), np.nan, np.float32)]}, "finite values"),
        ({"data": X, "prior": -1.0}, "finite prior >= 0"),
        ({"data": X, "batch_size": 0}, "batch_size >= 1"),
        ({"data": X, "max_samples": 0}, "max_samples >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate(model, **arguments)
    with pytest.raises(TypeError, match="an array, a dict of arrays or an iterable"):
        recalibrate(model, 3)
    single = sequential(layers.BatchNormalization(name="norm"), shape=(3,))
    with pytest.raises(ValueError, match="more than one value per channel"):
        recalibrate(single, [normal(1, 3)])
    assert recalibrate(model, X, batch_size=20, max_samples=30).report.samples == 40
