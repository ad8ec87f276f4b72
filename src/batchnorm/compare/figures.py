"""The report's figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from batchnorm.compare import curves
from batchnorm.compare.curves import Point
from batchnorm.compare.records import Run

NAMES = ["accuracy.png", "loss.png", "activations.png"]
# Okabe and Ito's colours, which the colour-blind can tell apart; the report's page uses the same.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[tuple[float, ...], ...] = ((5, 2.5), (), (1.5, 1.5), (8, 2, 1.5, 2), (3, 1), (10, 3), (1, 3))
DPI = 110


def draw(runs: Sequence[Run], target_accuracy: float) -> dict[str, bytes]:
    """Returns the pictures as PNG, by file name.

    Args:
        runs: Every run of the comparison.
        target_accuracy: Drawn as a line.
    """
    pictures = {"accuracy.png": _accuracy(runs, target_accuracy), "loss.png": _loss(runs)}
    activations = _activations(runs)
    if activations is not None:
        pictures["activations.png"] = activations
    return {name: _png(figure) for name, figure in pictures.items()}


def accuracy_floor(points: Sequence[Point]) -> float:
    """Returns where the accuracy axis begins: above the first steps, which would flatten the rest, and below 1."""
    after = sorted(point.low for point in points)
    return min(max(0.0, np.floor(10 * after[len(after) // 10]) / 10), 0.9) if after else 0.0


def loss_range(points: Sequence[Point]) -> tuple[float, float]:
    """Returns the ends of the logarithmic loss axis; a diverging run must not flatten the rest."""
    found = sorted(point.mid for point in points if point.mid > 0)
    if not found:
        return 0.1, 1.0
    low, high = found[0], min(found[-1], 10 * found[9 * len(found) // 10])
    return 0.9 * low, 1.1 * high


def _by_norm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.norm, []).append(run)
    return found


def _line(axes: Axes, points: Sequence[Point], index: int, by_seconds: bool, scale: float, label: str) -> None:
    x = [point.seconds if by_seconds else point.step for point in points]
    colour = COLOURS[index % len(COLOURS)]
    low, high = [scale * point.low for point in points], [scale * point.high for point in points]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    (line,) = axes.plot(x, [scale * point.mid for point in points], color=colour, linewidth=1.8, label=label)
    if dashes := DASHES[index % len(DASHES)]:
        line.set_dashes(dashes)


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _accuracy(runs: Sequence[Run], target_accuracy: float) -> Figure:
    figure, axes = _panels(1, 2)
    everything = []
    for index, (norm, of_norm) in enumerate(_by_norm(runs).items()):
        points = curves.curve(of_norm, curves.test_accuracy)
        everything += points
        for column, by_seconds in enumerate((False, True)):
            _line(axes[0, column], points, index, by_seconds, 100, norm)
    for panel, label in zip(axes.flat, ("training step", "training time (s)"), strict=True):
        panel.axhline(100 * target_accuracy, color="0.4", linewidth=0.8, linestyle=":")
        panel.set(xlabel=label, ylabel="test accuracy (%)", ylim=(100 * accuracy_floor(everything), 100))
    axes[0, 0].legend(frameon=False, loc="lower right")
    return figure


def _loss(runs: Sequence[Run]) -> Figure:
    figure, axes = _panels(2, 2)
    for row, (values, label) in enumerate(
        ((curves.test_loss, "test loss (nats)"), (curves.train_loss, "training loss (nats)"))
    ):
        everything = []
        for index, (norm, of_norm) in enumerate(_by_norm(runs).items()):
            points = curves.curve(of_norm, values)
            everything += points
            for column, by_seconds in enumerate((False, True)):
                _line(axes[row, column], points, index, by_seconds, 1, norm)
        for panel, x_label in zip(axes[row], ("training step", "training time (s)"), strict=True):
            panel.set(xlabel=x_label, ylabel=label, yscale="log", ylim=loss_range(everything))
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].legend(frameon=False, loc="upper right")
    return figure


def _activations(runs: Sequence[Run]) -> Figure | None:
    found = curves.distributions(runs)
    if found is None:
        return None
    figure, axes = _panels(1, len(found.columns))
    order = list(_by_norm(runs))
    for panel, (norm, columns) in zip(axes.flat, found.columns.items(), strict=True):
        colour = COLOURS[order.index(norm) % len(COLOURS)]
        steps = [columns[0].begin, *(column.end for column in columns)]
        shares = np.array([column.shares for column in columns]).T
        shades = LinearSegmentedColormap.from_list(norm, ["white", colour])
        panel.pcolormesh(steps, found.edges, shares, cmap=shades, vmin=0, vmax=found.most, rasterized=True)
        for percentile, values in zip(
            (15, 50, 85), zip(*(column.percentiles for column in columns), strict=True), strict=True
        ):
            style = "-" if percentile == 50 else "--"
            panel.plot([column.step for column in columns], values, style, color="black", linewidth=1)
        panel.grid(visible=False)
        panel.set(xlabel="training step", ylabel="input to the first activation", title=norm)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
