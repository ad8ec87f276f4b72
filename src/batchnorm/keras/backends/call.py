"""The arguments of one call that are not tensors, and the statistics that it returns."""

from __future__ import annotations

from typing import Any, NamedTuple


class Call(NamedTuple):
    """The constants of one call.

    Attributes:
        axis: The axis of x that holds the channels, counted from 0.
        epsilon: Added to the variance.
        activation: The name of the activation that the backend applies, or "none".
        parameter: The activation's parameter.
        synchronized: Whether the statistics are those of all processes or replicas.
        name: The layer's path, for messages between processes.
    """

    axis: int
    epsilon: float
    activation: str = "none"
    parameter: float = 0.0
    synchronized: bool = False
    name: str = ""


class Statistics(NamedTuple):
    """The statistics of one batch, without gradient.

    Attributes:
        mean: `[C]`, in float64 for float64 x, else in float32.
        variance: Biased, `[C]`.
        count: The number of values per channel that count: an integer, or a tensor, scalar or `[C]`.
    """

    mean: Any
    variance: Any
    count: Any
