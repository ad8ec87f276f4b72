"""Count the samples of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def samples_in(batch: object, shape: Sequence[int] | None = None) -> int:
    """Return the number of samples in a batch; 1 if it holds no tensors.

    A tensor or an array has as many samples as its first dimension, and a packed sequence has one for each sequence.
    A tuple, list or dict holds the parts of a batch, such as inputs and labels. A list within a part holds either one
    item for each sample, such as images, or several tensors that each hold all samples. The other parts or `shape`
    decide which. A list of dicts with common keys has one dict for each sample.

    Args:
        batch: A batch as the user's data yield it.
        shape: The shape of the input of the first layer that the batch reaches, if known. The first dimension is a
            multiple of the number of samples, and is 1 if the batch is a single sample without a batch dimension.
    """
    items = list(batch) if isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence) else []
    votes = Counter[int]()  # in the order of the parts
    if items and all(isinstance(item, Mapping) for item in items) and set.intersection(*map(set, items)):
        votes[len(items)] = len(items) + 1  # more than any dimension of the items gets
    for part in list(batch.values()) if isinstance(batch, Mapping) else items or [batch]:
        votes.update(_sizes(part))
    if len({x.ndim if isinstance(x, Tensor) else None for x in items} - {0, None}) == 1:
        votes[len(items)] += 0  # the batch itself may be a list of samples, but only the shape shows this
    if shape is None or not votes:
        return max(votes, key=votes.__getitem__, default=1)
    rows, x = shape[0], _first_array(batch)
    if rows in votes or (rows == 1 and x is not None and x.ndim == len(shape) - 1):
        return rows
    fitting = [size for size in votes if size > 1 and rows % size == 0]
    return max(fitting or votes, key=votes.__getitem__)


def _sizes(part: Any) -> list[int]:
    """Return the numbers of samples that a part may have, the most likely first; empty if it shows none."""
    if isinstance(part, PackedSequence):
        return [int(part.batch_sizes[0])]
    if isinstance(part, Tensor):  # a nested tensor has no shape
        return [part.size(0)] if part.dim() else []
    if isinstance(part, np.ndarray):
        return [part.shape[0]] if part.ndim else []
    if isinstance(part, Mapping):
        return list(dict.fromkeys(size for value in part.values() for size in _sizes(value)))
    if not isinstance(part, (list, tuple)) or not part:
        return []
    inner = [sizes for item in part if (sizes := _sizes(item))]
    common = [size for size in inner[0] if all(size in sizes for sizes in inner)] if inner else []
    return list(dict.fromkeys((len(part), *common)))


def _first_array(batch: object) -> Any:
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch
    children = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for child in children if (found := _first_array(child)) is not None), None)
