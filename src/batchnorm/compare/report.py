"""The report: one page that needs nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from batchnorm.compare import curves
from batchnorm.compare.curves import Point
from batchnorm.compare.figures import accuracy_floor, loss_range
from batchnorm.compare.records import Layer, Run
from batchnorm.compare.sampling import Sampling
from batchnorm.compare.summary import Outcome, duration, percent
from batchnorm.compare.training import OPTIMIZERS

CHANNELS_SHOWN = 256
LIBRARIES = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
QUANTITIES = ("weight", "bias", "running_mean", "running_var")


def render(runs: Sequence[Run], found: Sequence[Outcome], summary: dict[str, Any]) -> str:
    """Returns the page.

    Args:
        runs: Every run of the comparison.
        found: The outcome of each normalization.
        summary: The content of `summary.json`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_web), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number}
    template = environment.get_template("report.html.j2")
    settings = summary["settings"]
    return template.render(
        summary=summary,
        settings=settings,
        outcomes=found,
        charts=charts(runs, found, settings),
        layer_rows=layer_rows(runs),
        layers=[(norm, layer) for norm, layers in layers_of(runs, seed=0).items() for layer in layers],
        channels_shown=CHANNELS_SHOWN,
        optimizer=OPTIMIZERS[settings["optimizer"]].title,
        sampling=Sampling.parse(settings["sampling"]).title,
        watched={run.norm: run.watched for run in runs},
        not_shared={run.norm: run.own for run in runs},
        standard_error=_standard_error(found, summary["data"]["test_samples"]),
        duration=duration,
        style=_web("report.css"),
        script=_web("report.js"),
        libraries=[_web(name) for name in LIBRARIES],
    )


def charts(runs: Sequence[Run], found: Sequence[Outcome], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page's script draws."""
    by_norm = {outcome.norm: [run for run in runs if run.norm == outcome.norm] for outcome in found}
    accuracy, test_loss, train_loss = (
        {norm: curves.curve(of_norm, values) for norm, of_norm in by_norm.items()}
        for values in (curves.test_accuracy, curves.test_loss, curves.train_loss)
    )
    return {
        "norms": [outcome.norm for outcome in found],
        "target": 100 * settings["target_accuracy"],
        "curves": {
            "accuracy": {
                "label": "test accuracy (%)",
                "log": False,
                "domain": [100 * accuracy_floor(_all(accuracy)), 100],
                "series": [_series(points, 100) for points in accuracy.values()],
            },
            "test_loss": _loss("test loss (nats)", test_loss),
            "train_loss": _loss("training loss (nats)", train_loss),
        },
        "activations": _activations(runs),
    }


def _all(table: dict[str, list[Point]]) -> list[Point]:
    return [point for points in table.values() for point in points]


def _loss(label: str, table: dict[str, list[Point]]) -> dict[str, Any]:
    series = [_series(points, 1) for points in table.values()]
    return {"label": label, "log": True, "domain": loss_range(_all(table)), "series": series}


def _series(points: Sequence[Point], scale: float) -> list[dict[str, float]]:
    return [
        {
            "step": point.step,
            "seconds": _short(point.seconds),
            "mid": _short(scale * point.mid),
            "low": _short(scale * point.low),
            "high": _short(scale * point.high),
            "seeds": point.seeds,
        }
        for point in points
    ]


def _activations(runs: Sequence[Run]) -> dict[str, Any] | None:
    found = curves.distributions(runs)
    if found is None:
        return None
    return {
        "edges": [_short(edge) for edge in found.edges],
        "most": found.most,
        "panels": {
            norm: [
                {
                    "step": column.step,
                    "begin": column.begin,
                    "end": column.end,
                    "shares": [round(float(share), 5) for share in column.shares],
                    "percentiles": [_short(value) for value in column.percentiles],
                }
                for column in columns
            ]
            for norm, columns in found.columns.items()
        },
    }


@dataclass(frozen=True)
class LayerRow:
    """A normalization layer in the table: each quantity as (smallest, median, largest) over channels and seeds."""

    norm: str
    name: str
    kind: str
    channels: int
    quantities: list[tuple[float, float, float] | None]


def layers_of(runs: Sequence[Run], seed: int | None = None) -> dict[str, list[Layer]]:
    """Returns the layers of each normalization, of all seeds or of one."""
    found: dict[str, list[Layer]] = {}
    for run in runs:
        if seed is None or run.seed == seed:
            found.setdefault(run.norm, []).extend(run.layers)
    return {norm: layers for norm, layers in found.items() if layers}


def layer_rows(runs: Sequence[Run]) -> list[LayerRow]:
    """Returns the table of the normalization layers after training."""
    rows = []
    for norm, layers in layers_of(runs).items():
        for name in dict.fromkeys(layer.name for layer in layers):
            same = [layer for layer in layers if layer.name == name]
            quantities = [_extent([getattr(layer, quantity) for layer in same]) for quantity in QUANTITIES]
            channels = max(len(getattr(same[0], quantity) or []) for quantity in QUANTITIES)
            rows.append(LayerRow(norm, name, same[0].kind, channels, quantities))
    return rows


def _extent(values: Sequence[list[float | None] | None]) -> tuple[float, float, float] | None:
    flat = [value for channels in values if channels for value in channels if value is not None]
    return (min(flat), statistics.median(flat), max(flat)) if flat else None


def _standard_error(found: Sequence[Outcome], samples: int) -> float | None:
    """Returns the standard error, in points, that an accuracy has because the test set is a sample."""
    final = [outcome.final_accuracy.mean for outcome in found if outcome.final_accuracy]
    if not final:
        return None
    share = statistics.fmean(final)
    return 100 * math.sqrt(share * (1 - share) / samples)


def number(value: float | None) -> str:
    """Returns a number in three significant digits, with a true minus sign."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _web(name: str) -> str:
    return (resources.files("batchnorm.compare") / "web" / name).read_text(encoding="utf-8")
