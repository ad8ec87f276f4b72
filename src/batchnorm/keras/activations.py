"""The activations that operators apply in the same pass as the normalization."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from keras import activations

from batchnorm.reference import ACTIVATIONS


def _equal_functions() -> Iterator[tuple[Callable[..., Any], str, float]]:
    """Yield Keras's function, and the name and parameter of the operators' activation that equals it.

    Names are equal, except that Keras writes hard_ for hard. Sigmoid is left out, because Keras's function also
    attaches its logits to the result, which losses read.
    """
    for name in ACTIVATIONS:
        function = getattr(activations, name.replace("hard", "hard_"), None)
        if function is not None and name != "sigmoid":
            parameters = inspect.signature(function).parameters
            given = [parameters[option].default for option in ("negative_slope", "alpha") if option in parameters]
            yield function, name, given[0] if given else 0.0


FUSED = tuple(_equal_functions())


def fused(activation: Callable[..., Any]) -> tuple[str, float] | None:
    """Return the name and the parameter of the operators' activation, or None if there is none."""
    for function, name, parameter in FUSED:
        if function is activation:
            return name, parameter
    return None
