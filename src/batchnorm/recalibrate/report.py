"""What recalibration measured, and how far the statistics were from it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchnorm.models.report import Report
from batchnorm.moments import Moments


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer was given, and its statistics before and after.

    Vectors are float64 `[C]`; `[K, C]` for a layer that keeps statistics of K domains.

    Attributes:
        paths: Every place of the layer in the model.
        moments: Of all the values that the layer was given, over all ranks; one `Moments` for each domain.
        calls: The same for its first call in a forward pass, its second, and so on: more than one where the layer is
            used again, and then its statistics are those of all calls together.
        mean_before: The running mean that was replaced.
        var_before: The running variance that was replaced.
        mean: The running mean now: measured, or blended with the former by `prior`.
        var: The running variance now, unbiased.
    """

    paths: tuple[str, ...]
    moments: tuple[Moments, ...]
    calls: tuple[tuple[Moments, ...], ...]
    mean_before: Tensor
    var_before: Tensor
    mean: Tensor
    var: Tensor

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    @property
    def shift(self) -> Tensor:
        """How far the mean moved, in standard deviations of now."""
        return (self.mean - self.mean_before).abs() / self.var.sqrt()

    @property
    def ratio(self) -> Tensor:
        """Standard deviation now over that before."""
        return (self.var / self.var_before).sqrt()


@dataclass(frozen=True)
class Recalibration(Report):
    """What `recalibrate` did; prints as a table of the layers, with how far each had been off.

    Attributes:
        layers: What each layer that was reached was given, in the model's order.
        passes: "single" or "sequential".
        batches: How many batches were seen, over all ranks.
        samples: How many samples those held.
        ranks: How many processes took part.
        kept: With sequential passes: how many of this process's batches were kept between layers; the others were
            computed anew for every layer.
    """

    layers: tuple[LayerStatistics, ...] = ()
    passes: str = "single"
    batches: int = 0
    samples: int = 0
    ranks: int = 1
    kept: int = 0

    def __getitem__(self, path: str) -> LayerStatistics:
        """The statistics of the layer at this path."""
        for layer in self.layers:
            if path in layer.paths:
                return layer
        raise KeyError(path)

    def summary(self) -> str:
        """One line: how many layers, from how much data."""
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        passes = "single pass" if self.passes == "single" else "sequential passes"
        return f"{super().summary()}; {self.samples} samples in {batches}{ranks}, {passes}"
