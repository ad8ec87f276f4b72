"""Cases of `convert`, `freeze` and `unfreeze`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

import batchnorm
from batchnorm.keras import BatchNormalization
from batchnorm.keras.models.layers import as_numpy, norm_layers
from batchnorm.keras.surgery import convert, freeze, unfreeze
from tests.keras.verbs.models import (
    Subclassed,
    assert_same,
    assert_unchanged,
    nested,
    normal,
    randomized,
    sequential,
    subclassed,
    weights,
)

X = normal(6, 4)


def kinds(model: Any) -> set[type]:
    return {type(found.module) for found in norm_layers(model)}


@pytest.mark.parametrize("make", [nested, subclassed])
def test_convert_there_and_back_keeps_outputs_paths_and_weights(make: Any) -> None:
    model = make()
    before, paths = weights(model), [found.paths for found in norm_layers(model)]
    ours, report = convert(model)
    stock = convert(ours, layers.BatchNormalization).model
    assert kinds(ours) == {BatchNormalization} and kinds(stock) == {layers.BatchNormalization}
    assert [found.paths for found in norm_layers(ours)] == paths and not report.left
    assert type(ours) is type(model)
    assert_same(model, ours, X)
    assert_same(model, stock, X)
    assert_unchanged(before, model)
    assert_unchanged(before, stock)


def test_convert_the_copy_shares_no_variable() -> None:
    model = nested()
    before = weights(model)
    ours = convert(model).model
    for variable in ours.weights:
        variable.assign(as_numpy(variable) + 1.0)
    assert_unchanged(before, model)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras on torch
def test_convert_a_converted_model_can_be_saved_and_trained(tmp_path: Any) -> None:
    ours = convert(nested()).model
    ours.save(tmp_path / "model.keras")
    assert_same(ours, keras.models.load_model(tmp_path / "model.keras"), X)
    if keras.backend.backend() == "numpy":
        return  # cannot train
    found = norm_layers(ours)[0].module
    before = as_numpy(found.moving_mean)
    ours.compile("sgd", {"first": "mse", "second": "mse"})
    ours.train_on_batch(X, {"first": X, "second": X})
    assert not np.array_equal(as_numpy(found.moving_mean), before)


def test_convert_only_replaces_the_layers_that_match() -> None:
    model, report = convert(nested(), only="block.*")
    assert [change.path for change in report.changed] == ["block.norm", "block.second"]
    assert kinds(model) == {BatchNormalization, layers.BatchNormalization}
    with pytest.raises(ValueError, match="matches none of 4"):
        convert(nested(), only="head.*")


def test_convert_renorm_starts_at_the_moving_statistics() -> None:
    model = sequential(layers.BatchNormalization(), shape=(4,))
    (layer,) = convert(model, renorm=True).model.layers
    assert np.array_equal(as_numpy(layer.renorm_mean), as_numpy(model.layers[0].moving_mean))
    deviation = np.sqrt(as_numpy(model.layers[0].moving_variance).astype(np.float64) + layer.epsilon)
    for name in ("renorm_stddev", "moving_stddev"):
        assert np.allclose(as_numpy(getattr(layer, name)), deviation, rtol=1e-6)
    again = convert(convert(model, renorm=True).model, layers.BatchNormalization).model
    assert np.array_equal(as_numpy(again.layers[0].renorm_mean), as_numpy(layer.renorm_mean))


def test_convert_leaves_what_would_be_lost_or_stay_the_same() -> None:
    class Scaled(layers.BatchNormalization):
        def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
            return 2.0 * super().call(inputs, training=training, mask=mask)

    model = sequential(
        Scaled(name="scaled"), BatchNormalization(activation="relu", name="fused"), BatchNormalization(name="plain"),
        shape=(4,),
    )  # fmt: skip
    reasons = {change.path: change.reason for change in convert(model, layers.BatchNormalization).report.left}
    assert reasons == {
        "scaled": "Scaled computes something else: it has a call of its own",
        "fused": "keras.layers.BatchNormalization has no activation='relu'",
    }
    assert {change.path for change in convert(model).report.left} == {"scaled", "fused", "plain"}
    without = {change.path: change.reason for change in convert(model, scale=False).report.left}
    assert without["plain"] == "its gamma would be lost with scale=False"
    assert_same(model, convert(model).model, X)


def test_convert_keeps_dtype_policies_frozen_layers_and_layers_inside_wrappers() -> None:
    model = sequential(
        layers.BatchNormalization(dtype="mixed_bfloat16", name="half"), layers.Reshape((2, 2)),
        layers.TimeDistributed(layers.BatchNormalization(name="inside"), name="wrapper"), shape=(4,),
    )  # fmt: skip
    model.layers[0].trainable = False
    ours = convert(model).model
    assert ours.layers[0].compute_dtype == "bfloat16" and not ours.layers[0].trainable
    assert type(ours.layers[2].layer) is BatchNormalization
    assert_same(model, ours, X, 2e-2)


@pytest.mark.parametrize("make", [nested, subclassed])
def test_convert_keeps_layers_frozen_inside_layers_of_python_code(make: Any) -> None:
    model = make()
    found = {each.path: each.module for each in norm_layers(model)}
    found["block.norm"].trainable = found["block.second"].trainable = False
    for only in ("block.*", "inner.*"):
        copied = convert(model, only=only).model
        frozen = {each.path for each in norm_layers(copied) if not each.module.trainable}
        assert frozen == {"block.norm", "block.second"}


def test_convert_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="expects a Keras model, got int"):
        convert(3)
    with pytest.raises(TypeError, match="a class of batch normalization"):
        convert(nested(), layers.Dense)
    with pytest.raises(ValueError, match="without any"):
        convert(sequential(layers.Dense(2), shape=(4,)))
    with pytest.raises(ValueError, match="'block.norm', which has not been built"):
        convert(Subclassed())
    with pytest.raises(TypeError, match="options that BatchNormalization takes, got .*group_size.* Pass arguments"):
        convert(nested(), group_size=3)

    class Opaque(keras.Model):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.norm = norm

        def call(self, x: Any) -> Any:
            return self.norm(x)

    model = Opaque(layers.BatchNormalization())
    model(X)
    with pytest.raises(ValueError, match="whose copy failed"):
        convert(model)


def test_freeze_normalizes_by_the_moving_statistics_in_training_and_unfreeze_restores() -> None:
    model = nested()
    frozen, report = freeze(model)
    assert len(report.changed) == 4 and report.changed[0].now.startswith("frozen ")
    assert not any(found.module.trainable for found in norm_layers(frozen))
    assert all(found.module.trainable for found in norm_layers(model))
    before = as_numpy(norm_layers(frozen)[0].module.moving_mean)
    frozen(X, training=True)
    assert np.array_equal(as_numpy(norm_layers(frozen)[0].module.moving_mean), before)
    thawed, back = unfreeze(frozen)
    assert all(found.module.trainable for found in norm_layers(thawed)) and len(back.changed) == 4
    assert_same(model, thawed, X)
    assert {change.reason for change in freeze(frozen).report.left} == {"it is frozen already"}
    assert {change.reason for change in unfreeze(model).report.left} == {"it is not frozen"}


def test_freeze_in_place_needs_no_configuration_and_says_that_the_model_was_compiled() -> None:
    class Opaque(keras.Model):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.norm = norm

        def call(self, x: Any) -> Any:
            return self.norm(x)

    model = Opaque(layers.BatchNormalization(name="norm"))
    model(X)
    with pytest.raises(ValueError, match="whose copy failed: .* or pass inplace=True"):
        freeze(model)
    same, report = freeze(model, inplace=True)
    assert same is model and not model.norm.trainable and [change.path for change in report.changed] == ["norm"]
    assert unfreeze(model, inplace=True).model is model and model.norm.trainable
    compiled = nested()
    compiled.compile("sgd", "mse")
    report = freeze(compiled, only="inner.*", inplace=True).report
    assert "call compile() again" in report.notes[0]
    assert [found.path for found in norm_layers(compiled) if not found.module.trainable] == ["inner.norm"]


def test_freeze_an_interruption_changes_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nested()
    last = norm_layers(model)[-1].module

    class Interrupted(layers.BatchNormalization):
        trainable = property(lambda self: True, lambda self, value: self.interrupt(value))

        def interrupt(self, value: bool) -> None:
            if not value:
                raise KeyboardInterrupt

    monkeypatch.setattr(last, "__class__", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        freeze(model, inplace=True)
    assert all(found.module.trainable for found in norm_layers(model))


def test_unfreeze_leaves_a_layer_within_a_frozen_model() -> None:
    model = nested()
    model.get_layer("inner").trainable = False
    left = unfreeze(model, only="inner.norm").report.left
    assert [change.reason for change in left] == ["inner is frozen: set its trainable first"]


def test_a_compiled_model_is_copied_with_a_note() -> None:
    model = sequential(layers.BatchNormalization(), shape=(4,))
    model.compile("sgd", "mse")
    assert "not compiled" in convert(model).report.notes[0]
    assert not convert(randomized(sequential(layers.BatchNormalization(), shape=(4,)))).report.notes


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convert", ["GroupNorm"]),
        ("diagnose", [[X]]),
        ("fold", [X]),
        ("freeze", []),
        ("recalibrate", [[X]]),
        ("unfreeze", []),
    ],
    ids=["convert", "diagnose", "fold", "freeze", "recalibrate", "unfreeze"],
)
def test_functions_for_torch_name_those_for_keras_models(name: str, arguments: list[Any]) -> None:
    with pytest.raises(TypeError, match=rf"got Sequential\. For a Keras model use batchnorm\.keras\.{name}\.$"):
        getattr(batchnorm, name)(keras.Sequential(), *arguments)
