"""Cases of `fold`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from batchnorm.keras import BatchNormalization
from batchnorm.keras.models.layers import as_numpy, norm_layers
from batchnorm.keras.surgery import fold
from batchnorm.keras.surgery.fold import folding
from batchnorm.keras.surgery.fold.linear import Linear
from batchnorm.models.report import FoldError
from tests.keras.verbs.models import (
    EVERY_CASE,
    Block,
    assert_same,
    assert_unchanged,
    chosen,
    nested,
    normal,
    randomized,
    sequential,
    subclassed,
    weights,
)

IMAGE = (7, 7, 4)
FIRST = (4, 7, 7)


def norm(**options: Any) -> Any:
    return layers.BatchNormalization(**options)


CASES = {
    "dense": ((4,), lambda: [layers.Dense(6), norm()]),
    "dense_positions": (IMAGE, lambda: [layers.Dense(6, use_bias=False), norm(scale=False)]),
    "conv1d": ((9, 4), lambda: [layers.Conv1D(6, 3), norm(center=False)]),
    "conv1d_causal": ((9, 4), lambda: [layers.Conv1D(6, 3, padding="causal"), norm()]),
    "conv2d": (IMAGE, lambda: [layers.Conv2D(6, 3, padding="same", strides=2, use_bias=False), norm(), layers.ReLU()]),
    "conv2d_groups": (IMAGE, lambda: [layers.Conv2D(6, 3, groups=2, dilation_rate=2), norm()]),
    "conv3d": ((3, 3, 3, 4), lambda: [layers.Conv3D(6, 2), norm()]),
    "transposed": (IMAGE, lambda: [layers.Conv2DTranspose(6, 3, strides=2), norm()]),
    "transposed1d": ((9, 4), lambda: [layers.Conv1DTranspose(6, 3), norm()]),
    "depthwise": (IMAGE, lambda: [layers.DepthwiseConv2D(3, depth_multiplier=2), norm()]),
    "separable": (IMAGE, lambda: [layers.SeparableConv2D(6, 3, depth_multiplier=2), norm()]),
    "before_dense": ((4,), lambda: [norm(), layers.Dense(6, activation="relu")]),
    "before_conv1d": ((9, 4), lambda: [norm(), layers.Conv1D(6, 3)]),
    "before_groups": (IMAGE, lambda: [norm(), layers.Conv2D(6, 3, groups=2, use_bias=False)]),
    "before_pointwise": (IMAGE, lambda: [norm(), layers.Conv2D(6, 1, padding="same", strides=2)]),
    "before_transposed": (IMAGE, lambda: [norm(), layers.Conv2DTranspose(6, 1)]),
    "before_depthwise": (IMAGE, lambda: [norm(), layers.DepthwiseConv2D(3, depth_multiplier=2)]),
    "before_separable": (IMAGE, lambda: [norm(), layers.SeparableConv2D(6, 3, depth_multiplier=2)]),
    "two_into_one": (IMAGE, lambda: [norm(), layers.Conv2D(6, 3), norm()]),
    "past_pooling": (IMAGE, lambda: [layers.Conv2D(6, 3), layers.Dropout(0.5), layers.AveragePooling2D(2), norm()]),
    "past_global_pooling": (IMAGE, lambda: [norm(), layers.GlobalAveragePooling2D(), layers.Dense(3)]),
    "back_past_global_pooling": (IMAGE, lambda: [layers.Conv2D(6, 3), layers.GlobalAveragePooling2D(), norm()]),
    "past_flatten": (IMAGE, lambda: [norm(), layers.Flatten(), layers.Dense(3)]),
    "past_permute": ((5, 4), lambda: [norm(axis=1), layers.Permute((2, 1)), layers.Dense(3)]),
    "past_cropping": (IMAGE, lambda: [norm(), layers.Cropping2D(1), layers.UpSampling2D(2), layers.Conv2D(3, 3)]),
    "twice after": (IMAGE, lambda: [layers.Conv2D(6, 3), norm(), layers.Dropout(0.5), norm()]),
    "twice before": (IMAGE, lambda: [norm(), layers.Dropout(0.5), norm(), layers.Conv2D(6, 3)]),
    "fused": (IMAGE, lambda: [layers.Conv2D(6, 3), BatchNormalization(activation="relu"), layers.MaxPooling2D(2)]),
}
# TensorFlow has no convolution of channels first on the CPU; the core has none either.
CASES |= {
    "first": (FIRST, lambda: [layers.Conv2D(6, 3, data_format="channels_first"), norm(axis=1)]),
    "before_first": (FIRST, lambda: [norm(axis=1), layers.Conv2D(6, 3, data_format="channels_first")]),
    "first_flatten": (
        FIRST, lambda: [norm(axis=1), layers.Flatten(data_format="channels_first"), layers.Dense(3)],
    ),
    "first_depthwise": (
        FIRST, lambda: [layers.DepthwiseConv2D(3, data_format="channels_first", depth_multiplier=2), norm(axis=1)],
    ),
}  # fmt: skip

CORE = ("dense_positions", "conv2d", "transposed", "separable", "before_groups", "past_pooling", "fused")


@pytest.mark.parametrize("case", chosen(CASES, CORE))
def test_fold_removes_batch_normalization_and_keeps_the_results(case: str) -> None:
    shape, parts = CASES[case]
    model = sequential(*parts(), shape=shape)
    before = weights(model)
    folded, report = fold(model)
    assert not norm_layers(folded) and not report.left and report.remaining == 0
    assert_same(model, folded, normal(3, *shape, seed=1), 2e-6)
    assert report.error <= max(1e-6, 2 * report.error_before)
    assert_unchanged(before, model)


STAYS = {
    "activation between": (IMAGE, lambda: [layers.Conv2D(6, 3, activation="relu"), norm()], "follows the activation"),
    "activation layer": (IMAGE, lambda: [layers.Conv2D(6, 3), layers.ReLU(), norm()], "it follows re_lu"),
    "padding": (IMAGE, lambda: [norm(), layers.Conv2D(6, 3, padding="same")], "pads the result with zeros"),
    "zero padding": (IMAGE, lambda: [norm(), layers.ZeroPadding2D(1), layers.Conv2D(6, 3)], "pads with zeros"),
    "transposed": (IMAGE, lambda: [norm(), layers.Conv2DTranspose(6, 3)], "pads the result with zeros"),
    "input and result": (IMAGE, lambda: [norm()], "it follows an input; it is a result of the model"),
    "another axis": (IMAGE, lambda: [layers.Conv2D(6, 3), norm(axis=1)], "channels are not those of"),
    "negative scale": (IMAGE, lambda: [layers.Conv2D(6, 3), layers.MaxPooling2D(2), norm()], "negative scale"),
    "wrapped": ((5, 4), lambda: [layers.TimeDistributed(norm())], "inside a layer whose call is Python code"),
}


@pytest.mark.parametrize("case", chosen(STAYS, ["padding"]))
def test_fold_leaves_what_is_not_exact_and_says_why(case: str) -> None:
    shape, parts, reason = STAYS[case]
    model = sequential(*parts(), shape=shape)
    folded, report = fold(model)
    assert len(norm_layers(folded)) == 1 and len(report.left) == 1
    assert reason in report.left[0].reason
    assert_same(model, folded, normal(3, *shape), 1e-6)


def test_fold_a_padding_without_a_shift_is_passed() -> None:
    model = sequential(norm(center=False), layers.ZeroPadding2D(1), layers.Conv2D(6, 3, padding="same"), shape=IMAGE)
    model.layers[0].moving_mean.assign(np.zeros(4))
    folded, report = fold(model)
    assert not norm_layers(folded) and not report.left
    assert_same(model, folded, normal(3, *IMAGE))


def test_fold_in_models_inside_and_with_several_readers() -> None:
    inner = keras.Sequential([layers.Input((4,)), layers.Dense(4, name="dense"), norm(name="norm")], name="inner")
    x = keras.Input((4,))
    y = inner(x)
    read_twice = layers.Dense(4, name="read_twice")(y)
    z = norm(name="kept")(read_twice) + read_twice
    both = norm(name="both")(inner(z))
    model = randomized(keras.Model(x, [layers.Dense(2, name="a")(both), layers.Dense(3, name="b")(both)]))
    folded, report = fold(model)
    into = {change.path: set(change.now.removeprefix("in ").split(", ")) for change in report.changed}
    assert into == {"inner.norm": {"inner.dense"}, "both": {"a", "b"}}
    assert report.left[0].path == "kept" and "its input is also read by add" in report.left[0].reason
    assert_same(model, folded, normal(5, 4), 2e-6)


def test_fold_leaves_shared_layers_and_calls_with_arguments() -> None:
    x = keras.Input((4,))
    shared, dense = norm(name="shared"), layers.Dense(4, name="dense")
    y = shared(dense(x)) + shared(dense(x * 2.0))
    y = norm(name="trains")(layers.Dense(4)(y), training=True)
    y = norm(name="after")(dense(y))
    model = randomized(keras.Model(x, y))
    reasons = {change.path: change.reason for change in fold(model).report.left}
    assert reasons["shared"] == "it is used 2 times"
    assert reasons["trains"].startswith("it is called with arguments")
    assert reasons["after"].startswith("dense (Dense) is used 3 times")


def test_fold_in_half_precision_and_with_an_example() -> None:
    with_policy = {"dtype": "mixed_bfloat16"}
    model = sequential(layers.Dense(6, **with_policy), layers.BatchNormalization(**with_policy), shape=(4,))
    report = fold(model, normal(8, 4) * 100.0).report
    assert not report.left and report.error <= 10 * max(5e-2, 2 * report.error_before)
    with pytest.raises(ValueError, match="expects inputs that the model takes"):
        fold(model, normal(8, 5))


def test_fold_leaves_weights_that_would_overflow() -> None:
    model = sequential(layers.Dense(6, dtype="float16"), norm(), shape=(4,))
    model.layers[1].gamma.assign(np.full(6, 1e6))
    (left,) = fold(model).report.left
    assert "would not be finite in float16" in left.reason


def test_fold_leaves_a_fold_that_loses_digits() -> None:
    model = sequential(BatchNormalization(name="first"), layers.Dense(4), norm(name="second"), shape=(4,))
    model.layers[0].moving_mean.assign(np.full(4, 1e7))
    x = 1e7 + normal(8, 4)
    folded, report = fold(model, x)
    assert [change.path for change in report.changed] == ["second"]
    assert "folding it has an error of" in report.left[0].reason
    assert_same(model, folded, x)


def test_fold_a_wrong_formula_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Linear.after

    def after(self: Linear, s: Any, rank: int) -> Linear:
        changed = wrong(self, s, rank)
        changed.kernels["kernel"][..., 0] *= 1.01
        return changed

    monkeypatch.setattr(Linear, "after", after)
    model = sequential(layers.Conv2D(6, 3), norm(), layers.ReLU(), layers.Dense(3), norm(), shape=IMAGE)
    folded, report = fold(model)
    assert len(report.left) == 2 and all("folding it has an error" in change.reason for change in report.left)
    assert_same(model, folded, normal(3, *IMAGE))
    monkeypatch.setattr(folding._Runs, "allowed", lambda *_: True)
    with pytest.raises(FoldError, match="must give the original's results"):
        fold(model)


@pytest.mark.skipif(not EVERY_CASE, reason="the same on every backend")
def test_fold_shows_a_bar_after_some_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = sequential(layers.Dense(4), norm(), shape=(3,))
    fold(model, progress=True)
    assert not capsys.readouterr().err
    monkeypatch.setattr(folding, "PATIENCE", 0.0)
    fold(model)  # standard error is no terminal
    assert not capsys.readouterr().err
    fold(model, progress=True)
    shown = capsys.readouterr()
    assert all(step in shown.err for step in ("folding", "running the original")) and not shown.out


@keras.saving.register_keras_serializable("batchnorm_tests")
class InNumPy(layers.Layer):
    """A layer whose code reads values, so that JAX cannot compile it."""

    def call(self, x: Any) -> Any:
        return keras.ops.convert_to_tensor(np.tanh(as_numpy(x)))

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)


def test_fold_runs_layers_whose_code_reads_values() -> None:
    model = sequential(layers.Conv2D(6, 3), norm(), InNumPy(), shape=IMAGE)
    folded, report = fold(model)
    assert report.remaining == 0
    assert_same(model, folded, normal(2, *IMAGE))


def test_fold_refuses_a_subclassed_model_before_anything_is_touched() -> None:
    model = subclassed()
    before = weights(model)
    with pytest.raises(ValueError, match=r"got Subclassed 'subclassed', whose call is\s+Python code"):
        fold(model)
    assert_unchanged(before, model)


def test_fold_leaves_blocks_of_python_code_inside_a_functional_model() -> None:
    model = nested()
    report = fold(model).report
    assert {change.path for change in report.changed} == {"inner.norm"}
    reasons = {change.path: change.reason for change in report.left}
    assert reasons["block.norm"] == "it is inside a layer whose call is Python code"
    assert isinstance(model.get_layer("block"), Block)


@pytest.mark.skipif(not EVERY_CASE, reason="the same graphs on every backend, fastest on torch")
@pytest.mark.parametrize(
    ("name", "size", "kept"),
    [
        ("MobileNetV2", 32, 0),
        ("ResNet50", 32, 0),
        ("Xception", 71, 0),
        ("EfficientNetB0", 32, 0),
        ("DenseNet121", 32, 62),
    ],
)
def test_fold_networks_of_keras_applications(name: str, size: int, kept: int) -> None:
    network = getattr(keras.applications, name)
    model = network(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)
    generator = np.random.default_rng(0)
    for found in norm_layers(model):
        for variable, least in ((found.module.moving_mean, 0.0), (found.module.moving_variance, 0.75)):
            variable.assign(generator.random(variable.shape) * 0.5 + least)
        found.module.beta.assign(generator.random(found.module.beta.shape) * 0.5)
    folded, report = fold(model)
    assert len(norm_layers(folded)) == report.remaining == kept
    assert report.error < 1e-5
    assert_same(model, folded, generator.random((2, size, size, 3), np.float32), 1e-5)
    assert as_numpy(folded.outputs[0].shape[-1]) == 10
