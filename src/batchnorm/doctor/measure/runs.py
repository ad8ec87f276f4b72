"""The results of passes over the data that measurements need, in any framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from batchnorm.doctor.measure.effect import Outcome
from batchnorm.doctor.measure.layers import Layer
from batchnorm.models.execution.observe import Statistics


class Runs(ABC):
    """Passes of a model over batches, with chosen statistics in each layer.

    Args:
        layers: The layers with running statistics.
        budget: Number of further passes for single layers.

    Attributes:
        layers: The layers; after the first passes, with their measurements.
        sizes: The size of each batch.
        kept: The batches that are kept for the later passes.
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
        self.kept: Sequence[Any] = []
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

    def show_inputs(self, batch: Any, show: Callable[[Layer, Tensor], None]) -> None:
        """Run a batch with its own statistics, and show each layer's input, if that is possible."""
        return
