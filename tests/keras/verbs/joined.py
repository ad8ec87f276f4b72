"""Cases of `fold` at calls that compute one tensor from several, and at the borders of models inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers

from batchnorm.keras.models.layers import norm_layers
from batchnorm.keras.surgery import fold
from tests.keras.verbs.models import assert_same, normal, outputs, randomized

IMAGE = (7, 7, 4)


def conv(filters: int = 4, **options: Any) -> Any:
    return layers.Conv2D(filters, 3, padding="same", **options)


def pointwise() -> Any:
    return layers.Conv2D(3, 1)


def norm(**options: Any) -> Any:
    return layers.BatchNormalization(**options)


def inner(*parts: Any) -> Any:
    return keras.Sequential([layers.Input(IMAGE), *parts], name="inner")


def built(graph: Callable[[Any], Any]) -> Any:
    """Return a functional model with random weights."""
    x = keras.Input(IMAGE)
    return randomized(keras.Model(x, graph(x)))


def assert_folded(model: Any, x: Any) -> Any:
    """Check that no batch normalization is left, and the results. Return the folded model."""
    folded, report = fold(model)
    assert not norm_layers(folded) and not report.left
    assert_same(model, folded, x, 2e-6)
    return folded


def forward_twice(x: Any) -> Any:
    y = norm()(x)
    return pointwise()(layers.Concatenate()([y, layers.Dropout(0.5)(y), x]))


JOINED: dict[str, Callable[[Any], Any]] = {
    "addition": lambda x: norm()(layers.Add()([conv()(x), layers.Dropout(0.5)(norm()(conv()(x))), conv()(x)])),
    "operations": lambda x: norm()(conv()(x) + conv()(x) - conv()(x)),
    "addition of means": lambda x: norm()(conv()(x) + layers.GlobalAveragePooling2D(keepdims=True)(conv()(x))),
    "average": lambda x: norm()(layers.Average()([conv()(x), conv()(x)])),
    "maximum": lambda x: norm(scale=False)(layers.Maximum()([conv()(x), conv()(x)])),
    "concatenation": lambda x: norm()(layers.Concatenate()([conv(6)(x), layers.concatenate([conv(1)(x), conv(2)(x)])])),
    "positions": lambda x: norm()(keras.ops.concatenate([conv()(x), conv()(x)], axis=1)),
    "concatenation after": lambda x: pointwise()(layers.Concatenate()([norm()(x), layers.ReLU()(x)])),
    "concatenated twice": forward_twice,
}


@pytest.mark.parametrize("case", JOINED)
def test_fold_passes_joined_tensors(case: str) -> None:
    assert_folded(built(JOINED[case]), normal(2, *IMAGE))


def add_to_itself(x: Any) -> Any:
    y = conv()(x)
    return norm()(y + y)


def trained_around(x: Any) -> Any:
    twice, model = keras.Input(IMAGE), inner(conv(), norm())
    return keras.Model(twice, model(model(twice)))(x, training=True)


STAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "number": (lambda x: norm()(conv()(x) + 1.0), "it follows add"),
    "residual": (lambda x: norm()(conv()(x) + x), "its input is also read by conv2d"),
    "input": (lambda x: norm()(conv()(x) + norm()(x)), "it follows batch_normalization"),
    "itself": (add_to_itself, "reads its input twice"),
    "broadcast": (lambda x: norm()(conv(4)(x) + conv(1)(x)), "broadcasts its inputs"),
    "maximum": (lambda x: norm()(layers.Maximum()([conv()(x), conv()(x)])), "negative scale"),
    "reader": (lambda x: layers.Multiply()([norm()(x), x]), "(Multiply) reads its result"),
    "noise": (lambda x: norm()(layers.Dropout(0.5)(conv()(x), training=True)), "it follows dropout"),
    "trained model": (lambda x: inner(conv(), norm())(x, training=True), "inner, or a model around it, is called with"),
    "trained around": (trained_around, "inner, or a model around it, is called with"),
}


@pytest.mark.parametrize("case", STAYS)
def test_fold_leaves_joined_tensors_where_it_is_not_exact_and_says_why(case: str) -> None:
    graph, reason = STAYS[case]
    found = fold(built(graph)).report.left
    assert found and any(reason in change.reason for change in found)


def both_ways(x: Any) -> Any:
    last = keras.Sequential([layers.Input((7, 7, 6)), norm()])
    return pointwise()(norm()(last(inner(norm(), layers.Conv2D(6, 1))(conv()(x)))))


def deep(x: Any) -> Any:
    return norm()(inner(keras.Sequential([layers.Input(IMAGE), conv()]), layers.Dropout(0.5))(x))


def named_inputs(x: Any) -> Any:
    first, second = keras.Input(IMAGE, name="first"), keras.Input(IMAGE, name="second")
    model = keras.Model({"second": second, "first": first}, [norm()(first), norm()(conv()(second))])
    a, b = model({"first": conv()(x), "second": x})
    return norm()(a + b)


@pytest.mark.parametrize("graph", [both_ways, deep, named_inputs], ids=lambda graph: graph.__name__)
def test_fold_crosses_the_border_of_a_model_inside(graph: Callable[[Any], Any]) -> None:
    assert_folded(built(graph), normal(2, *IMAGE))


def test_fold_keeps_layers_that_python_code_also_calls() -> None:
    dense = layers.Dense(4, name="dense")
    x = keras.Input((5, 4))
    model = randomized(keras.Model(x, norm()(dense(x)) + layers.TimeDistributed(dense)(x)))
    folded, report = fold(model)
    assert report.left[0].reason.startswith("dense (Dense) is used 2 times")
    assert_same(model, folded, normal(2, 5, 4))


@pytest.mark.parametrize("how", ["sequential", "functional"])
def test_fold_transfer_learning_comes_back_from_its_file(how: str, tmp_path: Path) -> None:
    x = keras.Input(IMAGE)
    y = layers.ReLU(6.0)(norm()(conv(use_bias=False)(x)))
    y = layers.Add()([y, norm()(layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y))])
    base = keras.Model(x, norm(name="last")(conv(use_bias=False)(y)), name="base")
    base.trainable = False
    head = [layers.GlobalAveragePooling2D(), layers.BatchNormalization(), layers.Dense(10)]
    model = keras.Sequential([layers.Input(IMAGE), base, *head])
    if how == "functional":
        z = base(given := keras.Input(IMAGE), training=False)
        for layer in head:
            z = layer(z)
        model = keras.Model(given, z)
    folded = assert_folded(randomized(model), images := normal(2, *IMAGE))
    folded.save(tmp_path / "folded.keras")
    again = keras.saving.load_model(tmp_path / "folded.keras")
    assert (outputs(again, images)[0] == outputs(folded, images)[0]).all()
    assert not again.get_layer("base").trainable
