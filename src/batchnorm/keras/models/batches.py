"""Read the user's data batch by batch, in the forms that Keras takes, and call a model with a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import keras
from keras import tree

from batchnorm._options import checked_integer
from batchnorm.models.data.arrays import as_array

Forward = Callable[[Any, Any], Any]


class Batches:
    """The user's data, with a count of the batches and samples that were read.

    Args:
        caller: The function that the user called.
        data: An iterable of batches, such as a `tf.data.Dataset`, a `keras.utils.PyDataset`, a loader of PyTorch, a
            list or a generator; or all the data as an array, or as a dict of arrays.
        batch_size: The number of samples that arrays are divided into.
        max_samples: Stop after the batch that reaches this many samples; None reads all.

    Attributes:
        count: The number of batches.
        samples: The number of samples in them.

    Raises:
        TypeError: the data are none of these, a batch has no arrays, or a number is not an integer.
        ValueError: a number is out of range.
    """

    def __init__(self, caller: str, data: Any, batch_size: int, max_samples: int | None) -> None:
        batch_size = checked_integer(caller, "batch_size", batch_size, 1, "It divides arrays into batches.")
        if max_samples is not None:
            max_samples = checked_integer(caller, "max_samples", max_samples, 1, "None reads all the data.")
        whole = hasattr(data, "shape") or isinstance(data, Mapping)
        if isinstance(data, (str, bytes)) or not (whole or isinstance(data, (Iterable, keras.utils.PyDataset))):
            raise TypeError(
                f"{caller} expects data to be an array, a dict of arrays or an iterable of batches, got "
                f"{type(data).__name__}. Pass what fit() takes as x, or a list of batches."
            )
        self._caller, self._data, self._whole = caller, data, whole
        self._batch_size, self._max_samples = batch_size, max_samples
        self.count = self.samples = 0

    def __iter__(self) -> Iterator[Any]:
        """Read the data once, and count batches and samples."""
        for batch in self._batches():
            yield batch
            self.count += 1
            self.samples += size_of(self._caller, batch)
            if self._max_samples is not None and self.samples >= self._max_samples:
                return

    def _batches(self) -> Iterator[Any]:
        data = self._data
        if self._whole:
            for start in range(0, size_of(self._caller, data), self._batch_size):
                part = slice(start, start + self._batch_size)
                yield tree.map_structure(lambda values, part=part: values[part], data)
        elif isinstance(data, keras.utils.PyDataset):
            for number in range(data.num_batches or 0):
                yield data[number]
        else:
            yield from data


def size_of(caller: str, batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first array."""
    for part in tree.flatten(batch):
        if getattr(part, "shape", ()):
            return int(part.shape[0])
    raise _no_arrays(caller, batch)


def _no_arrays(caller: str, batch: Any) -> TypeError:
    return TypeError(
        f"{caller} expects batches of arrays whose first axis is the samples, got {type(batch).__name__} without any. "
        "Pass arrays, or a list of batches, each an array, a tuple (x, y) or a dict of arrays."
    )


def default_forward(caller: str) -> Forward:
    """Return the function that calls a model with a batch in evaluation, if the user passes none.

    From a tuple `(x, y)` or `(x, y, sample_weight)`, the model gets x, as in `fit`; from a list, it gets the whole list
    if it has as many inputs, and otherwise the first item, because loaders of PyTorch yield lists.
    """

    def forward(model: Any, batch: Any) -> Any:
        size_of(caller, batch)  # fails for a batch without arrays
        inputs = inputs_of(model, batch)
        return model(inputs, training=False)

    return forward


def inputs_of(model: Any, batch: Any) -> Any:
    """Return the model's inputs in a batch, as arrays."""
    if isinstance(batch, tuple) or (isinstance(batch, list) and len(batch) != _number_of_inputs(model)):
        batch = batch[0]
    return tree.map_structure(as_array, batch)


def _number_of_inputs(model: Any) -> int:
    inputs = getattr(model, "inputs", None)
    return len(inputs) if inputs else 1
