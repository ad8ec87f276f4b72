"""The report of pruning."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.models.report import Report


class PruneError(RuntimeError):
    """The pruned network does not run, or computes a wrong result. Nothing was changed."""


@dataclass(frozen=True)
class PruneReport(Report):
    """The batch normalizations that lost channels, and the size and time of the network before and after.

    Attributes:
        channels_before: Channels of all batch normalizations of the model.
        channels: The same after pruning.
        parameters_before: Number of values in the model's parameters.
        parameters: The same after pruning.
        bytes_before: Memory of the model's parameters and buffers.
        bytes: The same after pruning.
        seconds_before: Time of a forward pass in evaluation on the example inputs: the fastest of several.
        seconds: The same after pruning.
        difference: Largest difference of the outputs before and after, relative to the largest output, over the
            example and a random input.
    """

    channels_before: int = 0
    channels: int = 0
    parameters_before: int = 0
    parameters: int = 0
    bytes_before: int = 0
    bytes: int = 0
    seconds_before: float = 0.0
    seconds: float = 0.0
    difference: float = 0.0

    def _counts(self) -> list[str]:
        return [
            *super()._counts(),
            f"channels: {self.channels_before:,} -> {self.channels:,}",
            f"parameters: {self.parameters_before:,} -> {self.parameters:,}, with buffers "
            f"{self.bytes_before / 1e6:.3g} MB -> {self.bytes / 1e6:.3g} MB",
            f"forward pass: {self.seconds_before * 1e3:.3g} ms -> {self.seconds * 1e3:.3g} ms",
            f"largest relative difference of the output: {self.difference:.1e}",
        ]
