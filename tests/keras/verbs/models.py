"""Models for the cases, with random weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import layers
from numpy.typing import NDArray

from batchnorm.keras.models.layers import as_numpy

# Cases that differ in NumPy alone run on one backend, and a few of them on the others.
EVERY_CASE = keras.backend.backend() == "torch"


def chosen(cases: Iterable[str], core: Iterable[str]) -> list[str]:
    """Return all cases, or those of the core on all backends but one."""
    return list(cases if EVERY_CASE else core)


def randomized(model: Any, seed: int = 0) -> Any:
    """Give every weight a random value; variances are positive."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        values = generator.normal(size=variable.shape) * 0.5
        variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return model


def sequential(*parts: Any, shape: tuple[int, ...]) -> Any:
    """Return a Sequential model with random weights."""
    return randomized(keras.Sequential([layers.Input(shape), *parts]))


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Return random normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def outputs(model: Any, x: Any) -> list[NDArray[Any]]:
    """Return the results of a model in evaluation."""
    return [as_numpy(value) for value in keras.tree.flatten(model(x, training=False))]


def assert_same(first: Any, second: Any, x: Any, tolerance: float = 1e-6) -> None:
    """Check that two models give the same results, relative to the largest value."""
    for a, b in zip(outputs(first, x), outputs(second, x), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max()


def weights(model: Any) -> list[NDArray[Any]]:
    """Return copies of all weights."""
    return [as_numpy(variable) for variable in model.weights]


def assert_unchanged(before: list[NDArray[Any]], model: Any) -> None:
    """Check that the weights are the same, bit for bit."""
    after = weights(model)
    assert len(before) == len(after) and all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@keras.saving.register_keras_serializable("cases")
class Block(layers.Layer):
    """Layers in an attribute and in a list."""

    def __init__(self, width: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.norm = layers.BatchNormalization(name="norm")
        self.parts = [layers.Dense(width, name="dense"), layers.BatchNormalization(name="second")]

    def build(self, shape: Any) -> None:
        """Build the layers inside."""
        for layer in (self.norm, *self.parts):
            layer.build(shape)
            shape = (*shape[:-1], self.width if layer is self.parts[0] else shape[-1])

    def call(self, x: Any) -> Any:
        """Return the result."""
        for layer in (self.norm, *self.parts):
            x = layer(x)
        return x

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable("cases")
class Subclassed(keras.Model):
    """A model whose call is Python code."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = Block(name="block")
        self.named = {"norm": layers.BatchNormalization(name="in_dict")}
        self.inner = keras.Sequential([layers.Input((4,)), layers.BatchNormalization(name="deep")], name="inner")

    def call(self, x: Any) -> Any:
        """Return the result."""
        return self.inner(self.named["norm"](self.block(x)))

    def get_config(self) -> dict[str, Any]:
        """Return no arguments."""
        return {}


def nested() -> Any:
    """Return a functional model with a shared layer, an operation, a model inside, a block, and two results."""
    inner = keras.Sequential(
        [layers.Input((4,)), layers.Dense(4), layers.BatchNormalization(name="norm"), layers.Dropout(0.5)], name="inner"
    )
    shared = layers.BatchNormalization(name="shared")
    x = keras.Input((4,))
    y = shared(inner(x)) + shared(x)
    z = Block(name="block")(keras.ops.relu(y))
    return randomized(keras.Model(x, {"first": z, "second": inner(z) * 2.0}))


def subclassed() -> Any:
    """Return a subclassed model that was called once."""
    model = Subclassed(name="subclassed")
    model(normal(2, 4))
    return randomized(model)
