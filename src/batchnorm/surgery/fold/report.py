"""What folding did, and how far its result is from the original."""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm.models.report import Report


class FoldError(RuntimeError):
    """The folded network did not give the original's results; nothing was changed."""


@dataclass(frozen=True)
class FoldReport(Report):
    """What became of every batch normalization, one row for each time that the network calls one.

    Attributes:
        how: "fx" or "export": the graph holds for every size that the model takes; "modules": the model could not be
            traced as a whole, and its parts were folded, for every size; "fixed": for the example's size only. For an
            ONNX graph, what it was checked with: "onnxruntime", "onnxruntime, in float32" or "onnx.reference".
        error: Largest relative error of the folded network against the original in float64, over the example and a
            random input.
        error_before: The original's own, in its dtype.
        remaining: Batch normalizations that one forward pass still runs on their own, counted at the dispatcher.
        before: What one forward pass of the original runs.
        fused: Batch normalizations that had to stay, in one operation with the addition or activation that follows.
        notes: What else to know.
    """

    how: str = ""
    error: float = 0.0
    error_before: float = 0.0
    remaining: int = 0
    before: int = 0
    fused: int = 0
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Counts and errors, in two lines and one for each note."""
        kept = f"{self.remaining} left"
        if self.fused:
            kept += f", {self.fused} fused with what follows"
        return "\n".join(
            [
                f"{self.verb}: of {self.before} batch normalizations in a forward pass, {kept}",
                f"relative error against float64: {self.error:.1e}; before folding: {self.error_before:.1e}",
                *self.notes,
            ]
        )
