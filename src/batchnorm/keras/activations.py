"""The activations that operators apply in the same pass as the normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import activations

# Keras's function, and the name and parameter of the operators' activation that equals it. Sigmoid is absent, because
# Keras's function also attaches its logits to the result, which losses read.
FUSED: tuple[tuple[Callable[..., Any], str, float], ...] = (
    (activations.relu, "relu", 0.0),
    (activations.relu6, "relu6", 0.0),
    (activations.leaky_relu, "leaky_relu", 0.2),
    (activations.silu, "silu", 0.0),
    (activations.gelu, "gelu", 0.0),
    (activations.hard_silu, "hardswish", 0.0),
    (activations.mish, "mish", 0.0),
    (activations.hard_sigmoid, "hardsigmoid", 0.0),
    (activations.tanh, "tanh", 0.0),
    (activations.elu, "elu", 1.0),
)


def fused(activation: Callable[..., Any]) -> tuple[str, float] | None:
    """Return the name and the parameter of the operators' activation, or None if there is none."""
    for function, name, parameter in FUSED:
        if function is activation:
            return name, parameter
    return None
