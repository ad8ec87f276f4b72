"""The updates of running statistics in one training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from batchnorm.reference.statistics import Moments


@dataclass(frozen=True)
class TrainingStep:
    """The updates of running statistics in the forward and backward pass of one batch.

    Attributes:
        forward: Updates in the forward pass, by the layer's path.
        backward: Updates in the backward pass, by the layer's path.
        model_calls: Number of calls of the model.
        inputs: Moments of each layer's first input, with the randomness of training, by the layer's path.
    """

    forward: Mapping[str, int] = field(default_factory=dict)
    backward: Mapping[str, int] = field(default_factory=dict)
    model_calls: int = 1
    inputs: Mapping[str, Moments] = field(default_factory=dict)
