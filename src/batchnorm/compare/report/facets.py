"""How curves are spread over charts: one chart per batch size, or one for all choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.records import Run
from batchnorm.compare.report.summary import SHOWN, Outcome, shown


@dataclass(frozen=True)
class Facets:
    """The charts of each quantity, and the series in all of them.

    Attributes:
        grid: The grid of the comparison; if there is one chart per batch size, without the batch size.
        sizes: The batch size of each chart; None for one chart of all choices.
        titles: The title of each chart, if there are several.
        labels: The name of each series.
        drawn: How many series the page shows initially; these come first.
        runs: The runs of each chart, by series.
    """

    grid: Grid
    sizes: list[int | None]
    titles: list[str]
    labels: list[str]
    drawn: int
    runs: list[list[list[Run]]]

    @classmethod
    def of(cls, runs: Sequence[Run], found: Sequence[Outcome], grid: Grid) -> Facets:
        """Return one chart per batch size if other settings vary, too; otherwise one chart."""
        sizes: list[int | None] = [None]
        within = grid
        if "batch_size" in grid.varying and len(grid.varying) > 1:
            present = {outcome.choice.batch_size for outcome in found}
            sizes = [size for size in grid.batch_size if size in present]
            within = replace(grid, batch_size=grid.batch_size[:1])
        parts = [[o for o in found if size in (None, o.choice.batch_size)] for size in sizes]
        first = [within.label(outcome.choice) for part in parts for outcome in shown(part, grid)]
        labels = list(dict.fromkeys([*first, *(within.label(outcome.choice) for outcome in found)]))
        by_series = [
            [[run for run in runs if size in (None, run.choice.batch_size) and within.label(run.choice) == label]
             for label in labels]
            for size in sizes
        ]  # fmt: skip
        titles = ["" if size is None else f"batches of {size}" for size in sizes]
        return cls(within, sizes, titles, labels, min(SHOWN, len(set(first))), by_series)

    def index(self, choice: Choice) -> int:
        """Return the number of the series that a choice belongs to."""
        return self.labels.index(self.grid.label(choice))
