"""Observe the inputs of batch normalization in forward passes, and choose the statistics that it normalizes by."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from keras.backend import backend
from numpy.typing import NDArray

from batchnorm.keras.models.layers import Found, array, as_numpy
from batchnorm.reference.statistics import Moments, moments

Array = NDArray[np.float64]


class LayerCall(NamedTuple):
    """The nth call of a layer in a forward pass; layers are numbered in the model's order."""

    layer: int
    nth: int


class Statistics(NamedTuple):
    """The mean and the biased variance that a layer normalizes by, float64 `[C]`."""

    mean: Array
    var: Array


class Input(NamedTuple):
    """The input of a call.

    Attributes:
        x: The input, of any dtype, as an array.
        axis: The axis of the channels, not negative.
        mask: The positions that count, of x's shape without channels, or None.
    """

    x: NDArray[Any]
    axis: int
    mask: NDArray[Any] | None

    def moments(self) -> Moments:
        """Return the moments of each channel, of the positions that count."""
        with np.errstate(invalid="ignore", over="ignore"):  # callers check that the moments are finite
            return moments(self.x, weights=self.mask, axis=self.axis)


StatisticsFor = Callable[[LayerCall, Input], Statistics]


class Observer:
    """Makes layers show their inputs and normalize by chosen statistics, in evaluation.

    Attributes:
        model: The model.
        layers: The layers.
        statistics_for: Returns the statistics for a call; None leaves the layers alone.
        calls: The number of calls of each layer in this forward pass.
        trained: The layers that were called in training in this forward pass.
    """

    def __init__(self, model: Any, layers: Sequence[Found]) -> None:
        self.model = model
        self.layers = layers
        self.statistics_for: StatisticsFor | None = None
        self.calls: Counter[int] = Counter()
        self.trained: set[int] = set()
        self._failed: Exception | None = None

    def start(self, statistics_for: StatisticsFor | None) -> None:
        """Begin a forward pass."""
        self.statistics_for = statistics_for
        self.calls.clear()
        self.trained.clear()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Observe the layers in the block. Their moving statistics are restored at its end, also after an exception.

        An exception of `statistics_for` leaves the block as it was raised, without the text that Keras adds to it.
        """
        self._failed = None
        # If `model.predict` fails on JAX, Keras leaves its variables without values.
        values = [(variable, as_numpy(variable)) for variable in self.model.variables] if backend() == "jax" else []
        former = [statistics_of(found.module) for found in self.layers]
        own = [vars(found.module).get("call") for found in self.layers]
        try:
            for number, found in enumerate(self.layers):
                vars(found.module)["call"] = self._call(number, found.module, found.module.call)
            yield
        except BaseException as error:
            for variable, value in values:
                variable.assign(value)
            if self._failed is not None and isinstance(error, Exception):
                raise self._failed from None
            raise
        finally:
            for found, call, statistics in zip(self.layers, own, former, strict=True):
                if call is None:
                    vars(found.module).pop("call", None)
                else:
                    vars(found.module)["call"] = call
                put_statistics(found.module, statistics)

    def _call(self, number: int, layer: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(inputs, *args, **kwargs)
            if self.statistics_for is not None:
                at = LayerCall(number, self.calls[number])
                self.calls[number] += 1
                if given.arguments.get("training"):
                    self.trained.add(number)
                try:
                    statistics = self.statistics_for(at, _input(layer, inputs, given.arguments.get("mask")))
                except Exception as error:
                    self._failed = error
                    raise
                put_statistics(layer, statistics)
            if "training" in signature.parameters:  # a subclass may have a call of its own without it
                given.arguments["training"] = False
            return original(*given.args, **given.kwargs)

        return call


def statistics_of(layer: Any) -> Statistics:
    """Return a copy of the layer's moving statistics."""
    return Statistics(array(layer.moving_mean), array(layer.moving_variance))


def put_statistics(layer: Any, statistics: Statistics) -> None:
    """Write the layer's moving statistics."""
    layer.moving_mean.assign(statistics.mean)
    layer.moving_variance.assign(statistics.var)


def _input(layer: Any, inputs: Any, mask: Any) -> Input:
    try:
        x = as_numpy(inputs)
    except (TypeError, NotImplementedError, AttributeError) as error:  # of JAX and of TensorFlow
        raise TypeError(
            f"{layer.name} expects an input with values, got {type(inputs).__name__}, as in a compiled function or a "
            "loop of the backend. Pass a forward= that calls the model itself, not model.predict, or leave the layer "
            "out by only=."
        ) from error
    if x.dtype.kind not in "fiub":  # such as bfloat16 of ml_dtypes
        x = x.astype(np.float64)
    axis = layer.axis % x.ndim
    if mask is None:
        return Input(x, axis, None)
    # Keras's masks lack the last axis of the input, whatever the axis of the channels is.
    counts = np.moveaxis(np.broadcast_to(as_numpy(mask).astype(bool)[..., None], x.shape), axis, 1)
    if not (counts == counts[:, :1]).all():
        raise ValueError(
            f"{layer.name} expects a mask that is the same for all channels, got one that differs. "
            "With channels first, pass a mask of size 1 along the channels."
        )
    return Input(x, axis, counts[:, 0])
