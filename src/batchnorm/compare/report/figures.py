"""The report's figures as PNG pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from batchnorm.compare.directory import PICTURES
from batchnorm.compare.inputs.settings import Settings
from batchnorm.compare.records import Run
from batchnorm.compare.report import curves, heatmap
from batchnorm.compare.report.curves import Point
from batchnorm.compare.report.facets import Facets
from batchnorm.compare.report.summary import Outcome, shown

# Okabe and Ito's colours, which colour-blind people can distinguish; the report's page uses the same.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[tuple[float, ...], ...] = ((5, 2.5), (), (1.5, 1.5), (8, 2, 1.5, 2), (3, 1), (10, 3), (1, 3))
AXES = {"step": "training step", "epochs": "epoch", "seconds": "training time (s)"}
DPI = 110
ACROSS = 4  # panels side by side
SITES = 6  # rows of distributions after training
Series = dict[str, list[Run]]


def draw(runs: Sequence[Run], found: Sequence[Outcome], settings: Settings, samples: int) -> dict[str, bytes]:
    """Return the pictures as PNG, by file name.

    Args:
        runs: Every run of the comparison.
        found: The outcomes; the best of them are drawn.
        settings: The settings of the comparison.
        samples: Number of training samples.
    """
    series = curves.by_label(runs, shown(found, settings.grid))
    lines = _Lines(Facets.of(runs, found, settings.grid), samples, len(settings.grid.batch_size) > 1)
    drawn = (
        _accuracy(lines, settings.target_accuracy),
        _loss(lines),
        _activations(series, samples, lines.by_epoch),
        _layers(series),
        _grid(heatmap.panels(found, settings.grid)),
    )
    return {name: _png(figure) for name, figure in zip(PICTURES, drawn, strict=True) if figure is not None}


def accuracy_floor(points: Sequence[Point]) -> float:
    """Return the lower end of the accuracy axis, above the first steps, which would flatten the rest."""
    after = sorted(point.low for point in points)
    return min(max(0.0, np.floor(10 * after[len(after) // 10]) / 10), 0.9) if after else 0.0


def positive_range(points: Sequence[Point]) -> tuple[float, float]:
    """Return the ends of a logarithmic axis that a diverging run does not flatten."""
    found = sorted(point.mid for point in points if point.mid > 0)
    if not found:
        return 0.1, 1.0
    low, high = found[0], min(found[-1], 10 * found[9 * len(found) // 10])
    return 0.9 * low, 1.1 * high


def linear_range(points: Sequence[Point]) -> tuple[float, float]:
    """Return the ends of a linear axis that a diverging run does not flatten."""
    if not points:
        return 0.0, 1.0
    low, high = np.quantile([point.mid for point in points], [0.02, 0.98])
    margin = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


@dataclass(frozen=True)
class _Lines:
    """Options that all panels of curves share.

    Attributes:
        facets: One row of panels each.
        samples: Number of training samples.
        by_epoch: Whether the first panel of a row is by epoch instead of step, because batch sizes differ.
    """

    facets: Facets
    samples: int
    by_epoch: bool

    @property
    def labels(self) -> list[str]:
        return self.facets.labels[: self.facets.drawn]


def _line(axes: Axes, points: Sequence[Point], index: int, x_name: str, scale: float, label: str) -> None:
    x = [getattr(point, x_name) for point in points]
    colour = COLOURS[index % len(COLOURS)]
    low, high = [scale * point.low for point in points], [scale * point.high for point in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    (line,) = axes.plot(x, [scale * point.mid for point in points], color=colour, linewidth=1.8, label=label)
    if dashes := DASHES[(index + index // len(COLOURS)) % len(DASHES)]:
        line.set_dashes(dashes)


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Figure, axes: Axes, place: Literal["lower right", "upper right"]) -> None:
    """Add a legend inside the panel, or above the panels if it has more than three entries."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= 3:
        axes.legend(handles, labels, frameon=False, loc=place)
    elif labels:
        figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)


def _accuracy(lines: _Lines, target_accuracy: float) -> Figure:
    figure, axes = _panels(len(lines.facets.sizes), 2)
    points = _rows(axes, lines, curves.test_accuracy, "test accuracy (%)", 100)
    for panel in axes.flat:
        panel.axhline(100 * target_accuracy, color="0.4", linewidth=0.8, linestyle=":")
        panel.set(ylim=(100 * accuracy_floor(points), 100))
    _legend(figure, axes[0, 0], "lower right")
    return figure


def _loss(lines: _Lines) -> Figure:
    rows = len(lines.facets.sizes)
    figure, axes = _panels(2 * rows, 2)
    quantities = ((curves.test_loss, "test loss (nats)"), (curves.train_loss, "training loss (nats)"))
    for part, (values, label) in zip((axes[:rows], axes[rows:]), quantities, strict=True):
        points = _rows(part, lines, values, label, 1)
        for panel in part.flat:
            panel.set(yscale="log", ylim=positive_range(points))
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes[0, 0], "upper right")
    return figure


def _rows(axes: np.ndarray, lines: _Lines, values: curves.Values, label: str, scale: float) -> list[Point]:
    """Draw the curves of a quantity, one row of panels for each facet; return all their points.

    The first panel of a row is by step, or by epoch if batch sizes differ; the second is by time. All rows have the
    same axes.
    """
    facets, found = lines.facets, []
    facet = zip(facets.sizes, facets.titles, facets.runs, strict=True)
    for number, (row, (size, title, of_series)) in enumerate(zip(axes, facet, strict=True)):
        points = [curves.curve(runs, values, lines.samples) for runs in of_series[: facets.drawn]]
        found += [point for line in points for point in line]
        for panel, x_name in zip(row, ("epochs" if lines.by_epoch else "step", "seconds"), strict=True):
            for index, (name, line) in enumerate(zip(lines.labels, points, strict=True)):
                _line(panel, line, index, x_name, scale, name)
            panel.set(xlabel=AXES[x_name], ylabel=label, title=title)
            if number:
                panel.sharex(axes[0, int(x_name == "seconds")])
        if size is not None:
            steps = lines.samples // size
            top = row[0].secondary_xaxis("top", functions=(lambda x, s=steps: x * s, lambda x, s=steps: x / s))
            top.set_xlabel(AXES["step"], fontsize="small", color="0.4")
            top.tick_params(labelsize="small", colors="0.4")
    return found


def _layers(series: Series) -> Figure | None:
    """Draw the distributions after training: one row for each site, at most the first and the last ones."""
    sites = curves.sites(series)
    if not sites:
        return None
    if len(sites) > SITES:
        sites = sites[: SITES // 2] + sites[-SITES // 2 :]
    figure, axes = _panels(len(sites), len(curves.STAGES))
    order = list(series)
    titles = list(curves.STAGES.values())
    for panel in axes.flat:
        panel.set_visible(False)
    for row, site in zip(axes, sites, strict=True):
        for stage in site.stages:
            panel = row[titles.index(stage.title)]
            panel.set_visible(True)
            for label, shares in stage.shares.items():
                colour = COLOURS[order.index(label) % len(COLOURS)]
                panel.stairs(100 * shares, stage.edges, color=colour, label=label, linewidth=1.5)
                panel.stairs(100 * shares, stage.edges, color=colour, alpha=0.15, fill=True)
            panel.set_yscale("function", functions=(np.sqrt, np.square))
            panel.set_title(f"{site.title}: {stage.title}", fontsize="medium")
            panel.set(xlabel="value", ylabel="share of values (%)", ylim=(0, None))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    return figure


def _activations(series: Series, samples: int, by_epoch: bool) -> Figure | None:
    found = curves.distributions(series)
    if found is None:
        return None
    across = min(ACROSS, len(found.columns))
    figure, axes = _panels(math.ceil(len(found.columns) / across), across)
    order = list(series)
    for panel in axes.flat[len(found.columns) :]:
        panel.set_visible(False)
    for panel, (label, columns) in zip(axes.flat, found.columns.items(), strict=False):
        colour = COLOURS[order.index(label) % len(COLOURS)]
        per_unit = curves.epoch_steps(series[label][0], samples) if by_epoch else 1
        steps = np.array([columns[0].begin, *(column.end for column in columns)]) / per_unit
        shares = np.array([column.shares for column in columns]).T
        shades = LinearSegmentedColormap.from_list(label, ["white", colour])
        panel.pcolormesh(steps, found.edges, shares, cmap=shades, vmin=0, vmax=found.most, rasterized=True)
        for percentile, values in zip(
            (15, 50, 85), zip(*(column.percentiles for column in columns), strict=True), strict=True
        ):
            style = "-" if percentile == 50 else "--"
            panel.plot([column.step / per_unit for column in columns], values, style, color="black", linewidth=1)
        panel.grid(visible=False)
        panel.set(xlabel=AXES["epochs" if by_epoch else "step"], ylabel="input to the first activation", title=label)
    return figure


def _grid(panels: Sequence[heatmap.Panel]) -> Figure | None:
    if not panels:
        return None
    across = min(ACROSS, len(panels))
    down = math.ceil(len(panels) / across)
    width = max(0.9 * len(panel.columns) + 1.2 for panel in panels)
    height = max(0.5 * len(panel.rows) + 1.1 for panel in panels)
    figure = Figure(figsize=(max(5, width * across + 1), height * down), dpi=DPI, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    accuracies = [100 * s.accuracy for panel in panels for s in panel.squares if s.accuracy is not None]
    low, high = (min(accuracies), max(accuracies)) if accuracies else (0.0, 100.0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        values = np.full((len(panel.rows), len(panel.columns)), np.nan)
        for square in panel.squares:
            place = panel.rows.index(square.row), panel.columns.index(square.column)
            accuracy = None if square.accuracy is None else 100 * square.accuracy
            values[place] = np.nan if accuracy is None else accuracy
            text = square.text
            if square.diverged:
                text += f"\n{square.diverged} of {square.seeds}\ndiverged" if text else "diverged"
            dark = accuracy is not None and accuracy < (low + high) / 2
            axis.text(*place[::-1], text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        drawn = axis.imshow(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        axis.set_xticks(range(len(panel.columns)), panel.columns)
        axis.set_yticks(range(len(panel.rows)), panel.rows)
        axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    figure.colorbar(drawn, ax=axes, label="final test accuracy (%)", shrink=0.9)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
