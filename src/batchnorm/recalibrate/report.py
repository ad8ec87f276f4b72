"""The measured statistics of each layer, and their difference from the former ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from batchnorm.models.report import Report
from batchnorm.moments import Moments


@dataclass(frozen=True)
class LayerStatistics:
    """The measured input of one layer, and its running statistics before and after.

    Vectors are float64 `[C]`, or `[K, C]` for a layer with statistics of K domains.

    Attributes:
        paths: All paths of the layer in the model.
        moments: The moments of all values that reached the layer, over all ranks; one `Moments` for each domain.
        calls: The moments of the first call in a forward pass, of the second, and so on. A layer that is called several
            times gets the statistics of all calls together.
        mean_before: The former running mean.
        var_before: The former running variance.
        mean: The new running mean: measured, or averaged with the former one by `prior`.
        var: The new running variance, unbiased.
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
        """The distance between the former and the new mean, in new standard deviations."""
        return (self.mean - self.mean_before).abs() / self.var.sqrt()

    @property
    def ratio(self) -> Tensor:
        """The new standard deviation divided by the former one."""
        return (self.var / self.var_before).sqrt()


@dataclass(frozen=True)
class Recalibration(Report):
    """The report of `recalibrate`; prints as a table of the layers and their changes.

    Attributes:
        layers: The statistics of each layer that the data reached, in the model's order.
        passes: "single" or "sequential".
        batches: The number of batches, over all ranks.
        samples: The number of samples in them.
        ranks: The number of processes.
        kept: With sequential passes, the number of this process's forward passes that waited between layers. The others
            started again for every layer.
    """

    layers: tuple[LayerStatistics, ...] = ()
    passes: str = "single"
    batches: int = 0
    samples: int = 0
    ranks: int = 1
    kept: int = 0

    def __getitem__(self, path: str) -> LayerStatistics:
        """Return the statistics of the layer at this path."""
        for layer in self.layers:
            if path in layer.paths:
                return layer
        raise KeyError(path)

    def summary(self) -> str:
        """Return one line with the number of layers and the amount of data."""
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        passes = "single pass" if self.passes == "single" else "sequential passes"
        return f"{super().summary()}; {self.samples} samples in {batches}{ranks}, {passes}"
