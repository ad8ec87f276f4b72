"""Render the report page: one HTML file that needs no other files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from batchnorm.compare.inputs.choices import Grid
from batchnorm.compare.inputs.learning_rate import LearningRate
from batchnorm.compare.inputs.norms import AS_IS
from batchnorm.compare.inputs.optimizers import OPTIMIZERS
from batchnorm.compare.inputs.sampling import Sampling
from batchnorm.compare.inputs.settings import Settings
from batchnorm.compare.records import Layer, Run
from batchnorm.compare.report import curves, heatmap
from batchnorm.compare.report.curves import Point
from batchnorm.compare.report.facets import Facets
from batchnorm.compare.report.figures import accuracy_floor, linear_range, positive_range
from batchnorm.compare.report.headline import accuracy, duration, memory, percent, points
from batchnorm.compare.report.summary import Difference, Outcome, reference, shown
from batchnorm.page import render as render_page
from batchnorm.page import short

CHANNELS_SHOWN = 256
ROWS_SHOWN = 2000  # of all tables of channels together
QUANTITIES = ("weight", "bias", "running_mean", "running_var")
Charts = dict[str, Any]


def render(runs: Sequence[Run], found: Sequence[Outcome], summary: dict[str, Any]) -> str:
    """Return the page.

    Args:
        runs: Every run of the comparison.
        found: The outcome of each choice.
        summary: The content of `summary.json`.
    """
    settings = Settings.read(summary["settings"])
    drawn = shown(found, settings.grid)
    facets = Facets.of(runs, found, settings.grid)
    base = reference(found, settings.grid)
    return render_page(
        "batchnorm.compare.report",
        {
            **charts(facets, drawn, runs, settings, summary["data"]["train_samples"]),
            "grid": [asdict(panel) for panel in heatmap.panels(found, settings.grid)],
        },
        {"percent": percent, "accuracy": accuracy, "points": points, "duration": duration, "memory": memory},
        summary=summary,
        settings=settings,
        grid=settings.grid,
        as_is=settings.grid.norm == (AS_IS,),
        outcomes=found,
        best=min(found, key=lambda outcome: outcome.rank),
        reference=base,
        differences=[Difference.between(outcome, base) for outcome in found],
        facets=facets,
        drawn=drawn,
        sites=curves.sites(curves.by_label(runs, drawn)),
        layer_rows=layer_rows(runs, drawn),
        layers=_channels(runs, drawn),
        channels_shown=CHANNELS_SHOWN,
        optimizer=OPTIMIZERS[settings.optimizer].title,
        schedule=LearningRate.parse(settings.schedule),
        samplings=[Sampling.parse(sampling).title for sampling in settings.grid.sampling],
        watched=_watched(runs),
        not_shared=_not_shared(runs, settings.grid),
        standard_error=_standard_error(found, summary["data"]["test_samples"]),
        finished=len(runs),
        duration=duration,
    )


def charts(facets: Facets, drawn: Sequence[Outcome], runs: Sequence[Run], settings: Settings, samples: int) -> Charts:
    """Return the data that the page's script draws as curves and distributions.

    Args:
        facets: The charts of each quantity, and their series.
        drawn: The outcomes whose distributions the page shows.
        runs: Every run.
        settings: The settings of the comparison.
        samples: Number of training samples.
    """

    def chart(label: str, values: curves.Values, kind: str, scale: float = 1) -> Charts:
        lines = [[curves.curve(of_series, values, samples) for of_series in facet] for facet in facets.runs]
        return {
            "label": label,
            "log": kind == "log",
            # One for the initial series and one for all, because a failed series must not flatten the initial ones.
            "domains": [
                _domain(_all(line for facet in lines for line in facet[:count]), kind, scale)
                for count in (facets.drawn, None)
            ],
            "facets": [[_line(points, scale) for points in facet] for facet in lines],
        }

    found = {
        "accuracy": chart("test accuracy (%)", curves.test_accuracy, "share", 100),
        "test_loss": chart("test loss (nats)", curves.test_loss, "log"),
        "train_loss": chart("training loss (nats)", curves.train_loss, "log"),
        "gap": chart("training minus test accuracy (points)", curves.gap, "linear", 100),
        "gradient_norm": chart("norm of the gradient", curves.gradient_norm, "log"),
    }
    series = curves.by_label(runs, drawn)
    return {
        "labels": facets.labels,
        "drawn": facets.drawn,
        "facets": facets.titles,
        "axis": "epochs" if len(settings.grid.batch_size) > 1 else "step",
        "target": 100 * settings.target_accuracy,
        "curves": {name: each for name, each in found.items() if any(line for f in each["facets"] for line in f)},
        "percentiles": _percentiles(facets, samples),
        "activations": _activations(series, facets, samples),
        "outcomes": list(series),
        "sites": _sites(series),
    }


def _all(lines: Iterable[Sequence[Point]]) -> list[Point]:
    return [point for points in lines for point in points]


def _domain(points: Sequence[Point], kind: str, scale: float) -> list[float]:
    if kind == "share":
        return [scale * accuracy_floor(points), scale]
    low, high = positive_range(points) if kind == "log" else linear_range(points)
    return [short(scale * low), short(scale * high)]


def _line(points: Sequence[Point], scale: float) -> list[list[float]]:
    """Return step, epochs, seconds, mean, lowest, highest and number of seeds of each point."""
    return [[*_place(p), *(short(scale * value) for value in (p.mid, p.low, p.high)), p.seeds] for p in points]


def _place(point: Point) -> list[float]:
    return [point.step, short(point.epochs), short(point.seconds)]


def _percentiles(facets: Facets, samples: int) -> dict[str, Charts]:
    """Return the 15th, 50th and 85th percentile of each watched activation during training."""
    found = {}
    for where in ("first", "last"):
        lines = [
            [[curves.curve(runs, curves.percentile(where, which), samples) for which in range(3)] for runs in facet]
            for facet in facets.runs
        ]
        ends = [
            _all(line for facet in lines for of_series in facet[:count] for line in of_series)
            for count in (facets.drawn, None)
        ]
        if ends[1]:
            found[where] = {
                "label": f"input to the {where} activation",
                "domains": [_domain(points, "linear", 1) for points in ends],
                "facets": [
                    [
                        [[*_place(low), *(short(p.mid) for p in (low, mid, high))]
                         for low, mid, high in zip(*of_series, strict=True)]
                        for of_series in facet
                    ]
                    for facet in lines
                ],
            }  # fmt: skip
    return found


def _activations(series: dict[str, list[Run]], facets: Facets, samples: int) -> Charts | None:
    found = curves.distributions(series)
    if found is None:
        return None
    return {
        "edges": [short(edge) for edge in found.edges],
        "most": found.most,
        "panels": {
            label: {
                "series": facets.index(series[label][0].choice),
                "epoch_steps": curves.epoch_steps(series[label][0], samples),
                "step_seconds": series[label][0].steps[-1].train_seconds / len(series[label][0].steps),
                "columns": [
                    {
                        "step": column.step,
                        "begin": column.begin,
                        "end": column.end,
                        "shares": [round(float(share), 4) for share in column.shares],
                        "percentiles": [short(value) for value in column.percentiles],
                    }
                    for column in columns
                ],
            }
            for label, columns in found.columns.items()
        },
    }


def _sites(series: dict[str, list[Run]]) -> list[list[Charts]]:
    """Return the distributions after training, by site and stage."""
    order = list(series)
    return [
        [
            {
                "title": stage.title,
                "ends": [short(stage.edges[0]), short(stage.edges[-1])],
                "series": [
                    [order.index(label), [round(100 * float(share), 2) for share in shares]]
                    for label, shares in stage.shares.items()
                ],
            }
            for stage in site.stages
        ]
        for site in curves.sites(series)
    ]


@dataclass(frozen=True)
class LayerRow:
    """A normalization layer in the table: each quantity as (smallest, median, largest) over channels and seeds."""

    label: str
    name: str
    kind: str
    channels: int
    quantities: list[tuple[float, float, float] | None]


def layer_rows(runs: Sequence[Run], drawn: Sequence[Outcome]) -> list[LayerRow]:
    """Return the table of the normalization layers after training."""
    rows = []
    for label, of_label in curves.by_label(runs, drawn).items():
        layers = [layer for run in of_label for layer in run.layers]
        for name in dict.fromkeys(layer.name for layer in layers):
            same = [layer for layer in layers if layer.name == name]
            quantities = [_extent([getattr(layer, quantity) for layer in same]) for quantity in QUANTITIES]
            channels = max(len(getattr(same[0], quantity) or []) for quantity in QUANTITIES)
            rows.append(LayerRow(label, name, same[0].kind, channels, quantities))
    return rows


def _channels(runs: Sequence[Run], drawn: Sequence[Outcome]) -> list[tuple[str, int, Layer]]:
    """Return label, seed and layer for each table of channels; none if the tables would fill the page."""
    firsts = {label: of_label[0] for label, of_label in curves.by_label(runs, drawn).items()}
    found = [(label, run.seed, layer) for label, run in firsts.items() for layer in run.layers]
    rows = sum(min(CHANNELS_SHOWN, len(layer.weight or layer.running_mean or [])) for _, _, layer in found)
    return found if rows <= ROWS_SHOWN else []


def _not_shared(runs: Sequence[Run], grid: Grid) -> dict[str, list[str]]:
    """Return the parameters that each network does not share with the first, by the network's name."""
    networks = replace(grid, lr=grid.lr[:1], batch_size=grid.batch_size[:1], sampling=grid.sampling[:1])
    return {networks.label(run.choice): run.own for run in reversed(runs) if run.own}


def _watched(runs: Sequence[Run]) -> dict[str, str]:
    """Return the descriptions of the watched activations; several if networks differ."""
    found: dict[str, str] = {}
    for where in ("first", "last"):
        descriptions = dict.fromkeys(run.watched[where] for run in runs if where in run.watched)
        if descriptions:
            found[where] = " or ".join(descriptions)
    return found


def _extent(values: Sequence[list[float | None] | None]) -> tuple[float, float, float] | None:
    flat = [value for channels in values if channels for value in channels if value is not None]
    return (min(flat), statistics.median(flat), max(flat)) if flat else None


def _standard_error(found: Sequence[Outcome], samples: int) -> float | None:
    """Return the standard error of an accuracy, in points, that comes from the size of the test set."""
    final = [outcome.final_accuracy.mean for outcome in found if outcome.final_accuracy]
    if not final:
        return None
    share = max(final)
    return 100 * math.sqrt(share * (1 - share) / samples)
