"""The place of a layer in the graph of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Bias(NamedTuple):
    """The bias of a layer that the batch normalization after it subtracts.

    Attributes:
        path: The path of the layer.
        size: Number of values.
    """

    path: str
    size: int


@dataclass(frozen=True, eq=False)
class Place:
    """The place of a layer in the graph of the model.

    Attributes:
        source: The call that computes its input, such as `conv1 (conv2d)`.
        reader: The activation that reads its output, or else the calls that do.
        calls: The number of calls that use the same running statistics.
        foldable: Whether it can be folded into the layer before it.
        normalizes_data: Whether its input is the data themselves.
        useless_bias: The bias of the layer before it that has no effect.
        weight_sums: Returns the weights of the convolution or linear layer before it, summed over the kernel,
            `[C, inputs]`. They may be large, so they are computed only if they are needed.
    """

    source: str
    reader: str
    calls: int
    foldable: bool
    normalizes_data: bool = False
    useless_bias: Bias | None = None
    weight_sums: Callable[[], NDArray[np.float64]] | None = None
