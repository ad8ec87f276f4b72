"""The reports of functions that change a model, with a table and attributes; for every framework."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from batchnorm.models.data.arrays import as_array
from batchnorm.text import json_values, printable

if TYPE_CHECKING:
    from batchnorm.moments import Moments
    from batchnorm.reference.statistics import Moments as ArrayMoments

R = TypeVar("R", bound="Report", covariant=True)
FLOAT64 = "float64"


@dataclass(frozen=True)
class Change:
    """One layer of the model, before and after.

    Attributes:
        path: The layer's path in the model, such as `layer1.0.bn2`.
        was: The layer before, such as `BatchNorm2d(64)`.
        now: The layer after; the same as `was` if it was left.
        reason: The reason, if one is needed. A layer that was left always has one.
    """

    path: str
    was: str
    now: str
    reason: str = ""

    @classmethod
    def unchanged(cls, path: str, layer: str, reason: str) -> Change:
        """Return the entry of a layer that was left."""
        return cls(path, layer, layer, reason)


@dataclass(frozen=True)
class Report:
    """The changes that a function made to a model; prints as a table.

    Attributes:
        verb: The function's name.
        changed: The layers that were changed, in the model's order.
        left: The layers that were considered but left, each with the reason.
        notes: What the change means for other objects, such as the optimizer; a sentence or two each.
    """

    verb: str
    changed: tuple[Change, ...] = ()
    left: tuple[Change, ...] = ()
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        lines = [printable(self.summary(), lines=True)]
        if self.changed or self.left:
            header = ("layer", "was", "now", "why")
            rows = [header, *self._rows("", self.changed), *self._rows("left", self.left)]
            lines += ["", *_table(rows)]
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the numbers of layers that were changed and left, further figures, and the notes, a line each."""
        return "\n".join([*self._counts(), *map(printable, self.notes)])

    def _counts(self) -> list[str]:
        return [f"{self.verb}: {len(self.changed)} changed, {len(self.left)} left"]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name as plain values for JSON, with None for numbers that are not finite."""
        values: dict[str, Any] = json_values(self)
        return values

    @staticmethod
    def _rows(now: str, changes: Iterable[Change]) -> list[tuple[str, str, str, str]]:
        return [(c.path or "(model)", c.was, now or c.now, c.reason) for c in changes]


class Result(tuple[Any, R], Generic[R]):
    """The pair of the changed model and the report: `model, report = convert(model, ...)`.

    Every function that changes a model returns one. `result.model` is `result[0]`, and `result.report` is `result[1]`.
    """

    __slots__ = ()

    def __new__(cls, model: Any, report: R) -> Result[R]:  # noqa: D102  (the class documents it)
        return super().__new__(cls, (model, report))

    def __getnewargs__(self) -> tuple[Any, R]:
        return self[0], self[1]

    def __repr__(self) -> str:
        return f"Result(model={self.model!r}, report={self.report!r})"

    @property
    def model(self) -> Any:
        """The changed model."""
        return self[0]

    @property
    def report(self) -> R:
        """The layers that were changed or left, with reasons."""
        return self[1]


class FoldError(RuntimeError):
    """The folded network's results are not the original's. Nothing was changed."""


@dataclass(frozen=True)
class FoldReport(Report):
    """The result for every batch normalization, one row per call.

    Attributes:
        how: "fx" or "export": the result takes every size that the model takes; "modules": the model could not be
            traced as a whole, and its parts were folded, for every size; "fixed": the result takes the example's size
            only. For an ONNX graph, the program that ran it: "onnxruntime", "onnxruntime, in float32" or
            "onnx.reference". For a Keras model, "graph".
        error: Largest relative error of the folded network against the reference, over the example and a random input.
        error_before: The same error of the original, run in its own dtype.
        reference: What both were compared with: "float64", which is the original in float64; a description of
            another run of the original, if it cannot run in float64; "" if there was nothing to compare.
        remaining: Batch normalizations that one forward pass still runs on their own, counted at the dispatcher.
        before: Batch normalizations that one forward pass of the original runs.
        fused: Batch normalizations that became one operation with the addition or activation that follows them.
    """

    how: str = ""
    error: float = 0.0
    error_before: float = 0.0
    reference: str = ""
    remaining: int = 0
    before: int = 0
    fused: int = 0

    def _counts(self) -> list[str]:
        kept = f"{self.remaining} left"
        if self.fused:
            kept += f", {self.fused} fused with following operations"
        lines = [f"{self.verb}: of {self.before} batch normalizations in a forward pass, {kept}"]
        if self.reference:
            errors = f"{self.error:.1e}; before folding: {self.error_before:.1e}"
            lines.append(f"relative error against {self.reference}: {errors}")
        return lines


@dataclass(frozen=True)
class LayerStatistics:
    """The measured input of one layer, and its running statistics before and after.

    Vectors are float64 `[C]`, or `[K, C]` for a layer with statistics of K domains: tensors, or arrays for Keras.

    Attributes:
        paths: All paths of the layer in the model.
        moments: The moments of all values that reached the layer, over all ranks; one `Moments` for each domain. For
            Keras, those of `batchnorm.reference`.
        calls: The moments of the first call in a forward pass, of the second, and so on. A layer that is called several
            times gets the statistics of all calls together.
        mean_before: The former running mean.
        var_before: The former running variance.
        mean: The new running mean: measured, or averaged with the former one by `prior`.
        var: The new running variance: unbiased, but biased for Keras.
    """

    paths: tuple[str, ...]
    moments: tuple[Moments | ArrayMoments, ...]
    calls: tuple[tuple[Moments | ArrayMoments, ...], ...]
    mean_before: Any
    var_before: Any
    mean: Any
    var: Any

    @property
    def path(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    @property
    def shift(self) -> Any:
        """The distance between the former and the new mean, in new standard deviations."""
        return abs(self.mean - self.mean_before) / self.var**0.5

    @property
    def ratio(self) -> Any:
        """The new standard deviation divided by the former one."""
        return (self.var / self.var_before) ** 0.5

    def _change(self) -> dict[str, float]:
        """Return the change over the channels that vary; empty if none does."""
        usable = (as_array(self.var) > 0) & (as_array(self.var_before) > 0)
        if not usable.any():
            return {}
        shift, ratio = as_array(self.shift)[usable], as_array(self.ratio)[usable]
        return {
            "shift_median": float(np.median(shift)),
            "shift_max": float(shift.max()),
            "ratio_median": float(np.median(ratio)),
        }

    def change(self) -> str:
        """Return the change of mean and deviation, for the report."""
        text = "mean moved {shift_median:.2g}σ (at most {shift_max:.2g}σ), σ ×{ratio_median:.3g}"
        change = self._change()
        return text.format(**change) if change else "constant"

    def to_dict(self) -> dict[str, Any]:
        """Return the paths, the number of calls and the change, without the vectors, as plain values for JSON."""
        change: dict[str, Any] = self._change() or dict.fromkeys(("shift_median", "shift_max", "ratio_median"))
        values: dict[str, Any] = json_values({"paths": self.paths, "calls": len(self.calls), **change})
        return values

    def remarks(self) -> str:
        """Return further remarks, for the report."""
        parts = []
        if len(self.paths) > 1:
            parts.append(f"also {', '.join(self.paths[1:])}")
        if len(self.calls) > 1:
            parts.append(f"called {len(self.calls)} times in a forward pass: pooled")
        empty = [str(row) for row, moments in enumerate(self.moments) if moments.count == 0]
        if empty:
            parts.append(f"no data of domain {', '.join(empty)}: kept")
        return "; ".join(parts)


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

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name as plain values for JSON, without the vectors of the layers."""
        return {**super().to_dict(), "layers": [layer.to_dict() for layer in self.layers]}

    def _counts(self) -> list[str]:
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        passes = "single pass" if self.passes == "single" else "sequential passes"
        (counts,) = super()._counts()
        return [f"{counts}; {self.samples} samples in {batches}{ranks}, {passes}"]


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
