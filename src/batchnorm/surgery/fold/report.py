"""The report of a fold."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.models.report import Report
from batchnorm.text import printable


class FoldError(RuntimeError):
    """The folded network's results are not the original's. Nothing was changed."""


@dataclass(frozen=True)
class FoldReport(Report):
    """The result for every batch normalization, one row per call.

    Attributes:
        how: "fx" or "export": the result takes every size that the model takes; "modules": the model could not be
            traced as a whole, and its parts were folded, for every size; "fixed": the result takes the example's size
            only. For an ONNX graph, the program that ran it: "onnxruntime", "onnxruntime, in float32" or
            "onnx.reference".
        error: Largest relative error of the folded network against the original in float64, over the example and a
            random input.
        error_before: The same error of the original in its own dtype.
        remaining: Batch normalizations that one forward pass still runs on their own, counted at the dispatcher.
        before: Batch normalizations that one forward pass of the original runs.
        fused: Batch normalizations that became one operation with the addition or activation that follows them.
    """

    how: str = ""
    error: float = 0.0
    error_before: float = 0.0
    remaining: int = 0
    before: int = 0
    fused: int = 0

    def summary(self) -> str:
        """Return the counts, the errors and the notes, a line each."""
        kept = f"{self.remaining} left"
        if self.fused:
            kept += f", {self.fused} fused with following operations"
        return "\n".join(
            [
                f"{self.verb}: of {self.before} batch normalizations in a forward pass, {kept}",
                f"relative error against float64: {self.error:.1e}; before folding: {self.error_before:.1e}",
                *map(printable, self.notes),
            ]
        )
