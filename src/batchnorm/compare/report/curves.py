"""The data of the charts: curves with bands over the seeds, and distributions during and after training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchnorm.compare.records import Distribution, Evaluation, Histogram, Run
from batchnorm.compare.report.summary import Outcome

VALUE_BINS = 64
OUTSIDE = 0.005  # largest share of values outside the axis on each side
WIDEST = 5  # the axis extends beyond the narrowest distribution by at most this multiple of that one's range


@dataclass(frozen=True)
class Point:
    """One quantity at one step, over the seeds.

    Attributes:
        step: Training steps.
        epochs: Epochs of training.
        seconds: Training time, mean over the seeds.
        mid: Mean over the seeds.
        low: Smallest value.
        high: Largest value.
        seeds: Number of seeds with a value here; seeds that have diverged have none.
    """

    step: int
    epochs: float
    seconds: float
    mid: float
    low: float
    high: float
    seeds: int


Binned = Histogram | Distribution
Values = Callable[[Run], dict[int, tuple[float, float | None]]]  # seconds and value of a quantity, by step


def evaluated(value: Callable[[Evaluation], float | None]) -> Values:
    """Return a function that returns seconds and a value of each evaluation, by step."""
    return lambda run: {e.step: (e.train_seconds, value(e)) for e in run.evaluations}


test_accuracy = evaluated(lambda e: e.test_accuracy)
test_loss = evaluated(lambda e: e.test_loss)
gap = evaluated(lambda e: None if e.train_accuracy is None else e.train_accuracy - e.test_accuracy)


def train_loss(run: Run) -> dict[int, tuple[float, float | None]]:
    """Return seconds and the mean training loss since the previous evaluation, by step of the evaluation."""
    found: dict[int, tuple[float, float | None]] = {}
    begin = 0
    for evaluation in run.evaluations[1:]:
        losses = [step.loss for step in run.steps[begin : evaluation.step] if step.loss is not None]
        if losses:
            found[evaluation.step] = (evaluation.train_seconds, statistics.fmean(losses))
        begin = evaluation.step
    return found


def gradient_norm(run: Run) -> dict[int, tuple[float, float | None]]:
    """Return seconds and the norm of the gradient, by step, for the steps that recorded it."""
    return {s.step: (s.train_seconds, s.gradient_norm) for s in run.steps if s.gradient_norm is not None}


def percentile(where: str, which: int) -> Values:
    """Return a function that returns seconds and a percentile of a watched activation, by step.

    Args:
        where: `first` or `last`.
        which: 0, 1 or 2 for the 15th, 50th or 85th.
    """

    def values(run: Run) -> dict[int, tuple[float, float | None]]:
        return {
            h.step: (run.steps[h.step - 1].train_seconds, h.percentiles[which])
            for h in run.histograms
            if h.where == where and h.percentiles
        }

    return values


def by_label(runs: Sequence[Run], found: Sequence[Outcome]) -> dict[str, list[Run]]:
    """Return the runs of each outcome's choice, by its label."""
    return {outcome.label: [run for run in runs if run.choice == outcome.choice] for outcome in found}


def epoch_steps(run: Run, samples: int) -> int:
    """Return the number of steps in an epoch, given the number of training samples."""
    return samples // run.choice.batch_size


def curve(runs: Sequence[Run], values: Values, samples: int) -> list[Point]:
    """Return one quantity over the runs of one choice, step by step.

    Args:
        runs: The runs of the choice, perhaps none.
        values: Returns the quantity of a run.
        samples: Number of training samples.
    """
    tables = [values(run) for run in runs]
    points = []
    for step in sorted({step for table in tables for step in table}):
        here = [(t, v) for t, v in (table[step] for table in tables if step in table) if v is not None]
        if here:
            seconds, found = zip(*here, strict=True)
            epochs, mean = step / epoch_steps(runs[0], samples), statistics.fmean(found)
            points.append(Point(step, epochs, statistics.fmean(seconds), mean, min(found), max(found), len(found)))
    return points


@dataclass(frozen=True)
class Column:
    """The distribution in one training step, over all seeds.

    Attributes:
        step: The step.
        begin: Left end of its column on the step axis, halfway to the previous one.
        end: Right end, halfway to the next one.
        shares: Share of all values in each bin of the grid.
        percentiles: The 15th, 50th and 85th percentile, mean over the seeds.
    """

    step: int
    begin: float
    end: float
    shares: NDArray[np.float64]
    percentiles: list[float]


@dataclass(frozen=True)
class Distributions:
    """Distributions during training on a common grid of values.

    Attributes:
        edges: Edges of the grid's bins.
        most: The share with the darkest colour. A few bins have a larger share, such as those of the narrow first step.
        columns: The distributions of each choice, step by step.
    """

    edges: NDArray[np.float64]
    most: float
    columns: dict[str, list[Column]]


def distributions(series: dict[str, list[Run]]) -> Distributions | None:
    """Return the distributions of the first watched activation by label, or None if there are none."""
    usable = {
        label: [h for run in runs for h in run.histograms if h.where == "first" and h.percentiles]
        for label, runs in series.items()
    }
    usable = {label: histograms for label, histograms in usable.items() if histograms}
    if not usable:
        return None
    edges = _common_edges(list(usable.values()))
    columns = {label: _columns(histograms, edges) for label, histograms in usable.items()}
    peaks = [column.shares.max() for of_label in columns.values() for column in of_label]
    return Distributions(edges, float(np.quantile(peaks, 0.9)), columns)


STAGES = {
    "input": "before normalization",
    "normalized": "after normalization",
    "activated": "after the activation",
}


@dataclass(frozen=True)
class Stage:
    """Distributions of several choices at one place after training, on a common grid of values.

    Attributes:
        title: Before or after which operation.
        edges: Edges of the grid's bins.
        shares: Share of all values in each bin, mean over the seeds, by label.
    """

    title: str
    edges: NDArray[np.float64]
    shares: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Site:
    """One normalization or activation after training.

    Attributes:
        title: Its path in the networks; several if they differ.
        stages: The distributions before and after it.
    """

    title: str
    stages: list[Stage]


def sites(series: dict[str, list[Run]]) -> list[Site]:
    """Return the distributions after training. The k-th site of each network is in the k-th result."""
    every = [record for runs in series.values() for run in runs for record in run.distributions]
    found = []
    for number in sorted({record.site for record in every}):
        layers = dict.fromkeys(record.layer for record in every if record.site == number)
        stages = [_stage(series, number, stage, title) for stage, title in STAGES.items()]
        found.append(Site(" or ".join(layers), [stage for stage in stages if stage is not None]))
    return found


def _stage(series: dict[str, list[Run]], number: int, stage: str, title: str) -> Stage | None:
    here = {
        label: [r for run in runs for r in run.distributions if (r.site, r.stage) == (number, stage) and r.percentiles]
        for label, runs in series.items()
    }
    here = {label: records for label, records in here.items() if records}
    if not here:
        return None
    edges = _common_edges(list(here.values()))
    return Stage(title, edges, {label: _shares(records, edges) for label, records in here.items()})


def _shares(histograms: Sequence[Binned], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of values in each bin, mean over the histograms."""
    return np.mean([np.diff(np.interp(edges, *_cumulative(histogram))) for histogram in histograms], axis=0)


def _common_edges(groups: Sequence[Sequence[Binned]]) -> NDArray[np.float64]:
    """Return the edges of bins for several groups of histograms; a very wide group does not squeeze the others."""
    limits = [_limits(histograms) for histograms in groups]
    low, high = min(limits, key=lambda limit: limit[1] - limit[0])
    reach = WIDEST * (high - low)
    lowest = max(min(limit[0] for limit in limits), low - reach)
    highest = min(max(limit[1] for limit in limits), high + reach)
    return np.linspace(lowest, highest, VALUE_BINS + 1)


def _cumulative(histogram: Binned) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    counts = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    return np.linspace(histogram.low, histogram.high, len(counts)), counts / counts[-1]


def _limits(histograms: Sequence[Binned]) -> tuple[float, float]:
    """Return a range with nearly all values of nearly all steps, so that a diverging run does not set the scale."""
    ranges = []
    for histogram in histograms:
        edges, cumulative = _cumulative(histogram)
        ranges.append(np.interp([OUTSIDE, 1 - OUTSIDE], cumulative, edges))
    low, high = np.quantile([r[0] for r in ranges], 0.05), np.quantile([r[1] for r in ranges], 0.95)
    return float(low), float(high)


def _columns(histograms: Sequence[Histogram], edges: NDArray[np.float64]) -> list[Column]:
    steps = sorted({histogram.step for histogram in histograms})
    middles = [(before + after) / 2 for before, after in pairwise(steps)]
    bounds = [float(steps[0]), *middles, float(max(steps[-1], steps[0] + 1))]
    columns = []
    for step, (begin, end) in zip(steps, pairwise(bounds), strict=True):
        here = [histogram for histogram in histograms if histogram.step == step]
        percentiles = np.mean([histogram.percentiles or [] for histogram in here], axis=0).tolist()
        columns.append(Column(step, begin, end, _shares(here, edges), percentiles))
    return columns
