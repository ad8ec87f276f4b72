"""The results of passes over the data that measurements need, in any framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from batchnorm.doctor.measure.effect import Outcome
from batchnorm.doctor.measure.layers import Layer, Statistics
from batchnorm.doctor.measure.padding import PaddingEffect


class Runs(ABC):
    """Passes of a model over batches, with chosen statistics in each layer.

    Args:
        layers: The layers with running statistics.
        budget: Number of further passes for single layers.

    Attributes:
        layers: The layers; after the first passes, with their measurements.
        sizes: The size of each batch.
        by_batch: Outcome for the kept batches, each normalized by its own statistics.
        by_running: Outcome normalized by the running statistics.
        by_population: Outcome normalized by the population's statistics; None if outputs cannot be compared.
        loss_source: Where the loss comes from, or why there is none, if the user gave none; empty if neither is known.
    """

    def __init__(self, layers: list[Layer], budget: int) -> None:
        self.layers = layers
        self.budget = budget
        self.by_batch, self.by_running = Outcome(), Outcome()
        self.by_population: Outcome | None = None
        self.sizes: list[int] = []
        self.loss_source = ""

    def spend(self) -> bool:
        """Take one pass from the budget; return whether there was one."""
        self.budget -= 1
        return self.budget >= 0

    @abstractmethod
    def again(self, statistics: Mapping[int, Statistics | tuple[Statistics, ...]], title: str) -> Outcome:
        """Run the kept batches with other statistics in some layers; a tuple has one entry for each call of a layer."""

    def reshuffled(self) -> Outcome | None:
        """Run the samples of the kept batches in new random batches; None if that is not possible."""
        return None

    def padding(self) -> PaddingEffect | None:
        """Measure the input of each layer with and without padding; None if the data have no padding."""
        return None

    def _set(self, number: int, **changes: Any) -> None:
        self.layers[number] = replace(self.layers[number], **changes)
