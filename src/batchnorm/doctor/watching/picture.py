"""Draw maps of the layers during training."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "A picture of a watch expects matplotlib to be installed, and it is not. Run pip install matplotlib, or use "
        "the history."
    ) from error

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.watching.records import QUANTITIES, Record
from batchnorm.doctor.wording import listed, named
from batchnorm.files import write_whole

# Smallest upper end of each scale, so that harmless values stay pale.
_ENDS = {"mean_distance": 0.5, "log_ratio": 0.8, "noise": 0.5, "dead": 0.5, "updates": 2.0}
_LONGEST = 34
_NONE = "#d9d9d9"


def draw(history: Sequence[Sequence[Record]], findings: Sequence[Finding]) -> Figure:
    """Draw a map for each quantity: layers from top to bottom in the model's order, steps to the right.

    The number of updates is drawn only if it is not 1 in every step.
    """
    if not history:
        raise ValueError("Watch.plot expects at least one look, got none. Call it after the second training step.")
    steps = np.array([records[0].step for records in history])
    paths = [_short(named(record.layer)) for record in history[0]]
    values = {q: _values(history, q) for q in QUANTITIES}
    shown = [q for q in QUANTITIES if q != "updates" or bool((np.nan_to_num(values[q], nan=1.0) != 1).any())]
    height = max(2.4, 0.145 * len(paths) + 1.1)
    text = [f"{f.code} {f.title}: {listed(f.paths)}" for f in findings]
    below = 0.19 * len(text) + 0.1 * bool(text)
    figure = Figure(figsize=(1.6 + 2.6 * len(shown), height + below), layout="constrained")
    all_axes: Any = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axes, quantity in zip(all_axes[0], shown, strict=True):
        _map(axes, steps, values[quantity], quantity)
    first: Axes = all_axes[0][0]
    first.set_yticks(np.arange(len(paths)), paths, fontsize=7.5)
    first.invert_yaxis()
    if text:
        figure.supxlabel("\n".join(text), fontsize=8, x=0.01, ha="left")
    return figure


def save(plot: Callable[[], Figure], path: Path) -> None:
    """Write the figure to the path, completely or not at all."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(
            f"Watch.save expects a path that ends in .png, .svg or .pdf, got {str(path)!r}. Change the name."
        )
    drawn = io.BytesIO()
    plot().savefig(drawn, format=path.suffix[1:], dpi=150)
    write_whole(path, drawn.getvalue())


def _map(axes: Axes, steps: NDArray[Any], values: NDArray[np.float64], quantity: str) -> None:
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    end = max(_ENDS[quantity], largest if math.isfinite(largest) else 0.0)
    low, colours = (-end, "RdBu_r") if quantity == "log_ratio" else (0.0, "magma_r")
    # A look represents the steps until the next one.
    edges = np.append(steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)) - 0.5
    rows = np.arange(values.shape[0] + 1) - 0.5
    axes.set_facecolor(_NONE)
    mesh = axes.pcolormesh(edges, rows, np.ma.masked_invalid(values), vmin=low, vmax=end, cmap=colours)
    mesh.set_rasterized(True)
    axes.set_title(QUANTITIES[quantity], fontsize=9)
    axes.set_xlabel("step", fontsize=7.5, labelpad=1)
    axes.tick_params(labelsize=7.5, length=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    bar = axes.figure.colorbar(mesh, ax=axes, location="bottom", pad=0.02, aspect=30)
    bar.ax.tick_params(labelsize=7.5, length=2)


def _values(history: Sequence[Sequence[Record]], quantity: str) -> NDArray[np.float64]:
    """Return the values `[layers, looks]`, NaN if a value is unknown."""
    rows = [[getattr(record, quantity) for record in records] for records in history]
    return np.array([[math.nan if v is None else float(v) for v in row] for row in rows]).T


def _short(path: str) -> str:
    return path if len(path) <= _LONGEST else "…" + path[1 - _LONGEST :]
