"""The diagnosis as a page: verdict, the network as a strip of layers, findings, charts. Needs jinja2."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchnorm.doctor.finding import Finding, Severity, grouped
from batchnorm.doctor.measure.effect import signed
from batchnorm.doctor.measure.facts import LayerFacts
from batchnorm.doctor.measure.layers import counted
from batchnorm.doctor.measure.measures import Channels, LayerMeasures
from batchnorm.doctor.rules import RULES
from batchnorm.page import number, render

if TYPE_CHECKING:
    from batchnorm.doctor.report.diagnosis import Diagnosis

# Channels that the page holds whole, those of the worst layers first; about 1 MB.
_CHANNELS = 32_768
# Of each further layer those that are farthest off.
_FARTHEST = 64
_BINS = 30
# More than this many parts of a network are not told apart in the strip.
_PARTS = 16
# Every cost that a finding can have, in words.
_COSTS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {signed(value)}",
    "other_class": lambda value: f"{value:.1%} of the samples get another class",
    "parameters": lambda value: f"{value:,.0f} parameters",
    "error": lambda value: f"error of {value:.2g}σ",
    "padding": lambda value: f"{value:.0%} of the positions are padding",
}


@dataclass(frozen=True)
class Row:
    """A layer in the strip and in the table.

    Attributes:
        number: Which of the layers.
        path: In words.
        health: `ok`, or the worst severity of its findings.
        findings: The findings that name it or what computes its input.
        facts: Its facts in words, each with its name.
    """

    number: int
    path: str
    health: str
    findings: tuple[Finding, ...]
    facts: dict[str, str]


def rendered(diagnosis: Diagnosis) -> str:
    """The page."""
    rows = rows_of(diagnosis)
    ranks = ranked(diagnosis, rows)
    return render(
        "batchnorm.doctor.report",
        charts(diagnosis, rows, ranks),
        {"path": _path},
        diagnosis=diagnosis,
        conditions=diagnosis.conditions,
        verdict=verdict(diagnosis),
        start=next((finding for finding in diagnosis.findings if is_code(finding.repair)), None),
        rows=rows,
        parts=parts(rows),
        chosen=ranks[0],
        why={rule.code: rule.why for rule in RULES},
        compared=sum(measures.divergence is not None for measures in diagnosis.measures),
        noisy=sum(measures.noise is not None for measures in diagnosis.measures),
        measured=diagnosis.batches > 0,
        cost=cost,
        not_checked=grouped(diagnosis.not_checked),
        is_code=is_code,
        counted=counted,
    )


def verdict(diagnosis: Diagnosis) -> list[str]:
    """What the diagnosis comes to, in sentences."""
    layers = f"{counted(len(diagnosis.layers), 'layer')} of batch normalization"
    number_of = {s: sum(finding.severity == s for finding in diagnosis.findings) for s in Severity}
    if diagnosis.healthy:
        notes = f"; {counted(number_of[Severity.NOTE], 'note')}" if diagnosis.findings else ""
        found = [f"Nothing above a note was found in the {layers} of {diagnosis.model}{notes}."]
    else:
        counts = [counted(number_of[s], s.label) for s in (Severity.ERROR, Severity.WARNING) if number_of[s]]
        worst = diagnosis.findings[0]
        found = [
            f"{diagnosis.model} has {' and '.join(counts)} in its {layers}. The worst, {worst.code}: {worst.title}.",
            f"{worst.summary[:1].upper()}{worst.summary[1:]}.",
        ]
    if not diagnosis.batches:
        found.append("No data were given, so that only what the model itself shows was looked at.")
    elif not diagnosis.conditions.loss:
        found.append("No loss was given: costs are changes of the output, and nothing is an error because of them.")
    whole = sum(not rule.paths for rule in diagnosis.not_checked)
    if whole:
        found.append(f"{counted(whole, 'rule')} could not be applied; the reasons stand at the end.")
    return found


def cost(finding: Finding) -> list[str]:
    """What a finding costs, in words."""
    return [_COSTS[name](value) for name, value in finding.cost.items()]


# The strip and the table -------------------------------------------------------------------------------------------


def rows_of(diagnosis: Diagnosis) -> list[Row]:
    """The layers, in the model's order."""
    rows = []
    for index, (layer, measures) in enumerate(zip(diagnosis.layers, diagnosis.measures, strict=True)):
        findings = tuple(finding for finding in diagnosis.findings if _names(finding, layer))
        worst = max((finding.severity for finding in findings), default=None)
        rows.append(
            Row(index, _path(layer.path), "ok" if worst is None else worst.label, findings, words(layer, measures))
        )
    return rows


def _names(finding: Finding, layer: LayerFacts) -> bool:
    own = {layer.path, *layer.also}
    return any(path in own or (path and layer.after.startswith(f"{path} (")) for path in finding.paths)


def words(layer: LayerFacts, measures: LayerMeasures) -> dict[str, str]:
    """A layer's facts, each under its name."""
    return {
        "kind": f"{layer.kind}({layer.channels})",
        "after": layer.after or "?",
        "before": layer.before or "?",
        "mode": "training" if layer.training else "evaluation",
        "momentum": "cumulative average" if layer.momentum is None else f"{layer.momentum:g}",
        "ε": f"{layer.eps:g}",
        "updates seen": "–" if layer.updates is None else f"{layer.updates:,}",
        "γ": _span(layer.weight),
        "β": _span(layer.bias),
        "running mean": _span(layer.running_mean),
        "running variance": _span(layer.running_var),
        "channels with γ ≈ 0": "–" if layer.dead is None else f"{layer.dead:.0%}",
        "foldable": "?" if layer.foldable is None else "yes" if layer.foldable else "no",
        "running mean off": _with_unit(measures.shift, "σ"),
        "divergence": _with_unit(measures.divergence, " nats"),
        "batch noise": _with_unit(measures.noise, "σ"),
    }


def parts(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """The layers by the part of the network that they are in: the first level of names that tells parts apart."""
    deepest = max(row.path.count(".") for row in rows)
    for depth in range(1, deepest + 1):
        found: list[tuple[str, list[Row]]] = []
        for row in rows:
            name = ".".join(row.path.split(".")[:depth])
            if not found or found[-1][0] != name:
                found.append((name, []))
            found[-1][1].append(row)
        largest = max(len(part) for _, part in found)
        if len(found) > _PARTS:
            break
        if len(found) > 1 and largest <= 0.7 * len(rows):
            return found
    return [("", rows)]


def ranked(diagnosis: Diagnosis, rows: list[Row]) -> list[int]:
    """The numbers of the layers, worst first: by severity, then by divergence."""
    severity = {"ok": 0} | {s.label: int(s) for s in Severity}

    def rank(row: Row) -> tuple[float, float]:
        return -severity[row.health], -(diagnosis.measures[row.number].divergence or 0.0)

    return [row.number for row in sorted(rows, key=rank)]


# The charts --------------------------------------------------------------------------------------------------------


def charts(diagnosis: Diagnosis, rows: list[Row], ranks: Iterable[int]) -> dict[str, Any]:
    """What the page's script draws."""
    most = {}
    left = _CHANNELS
    for index in ranks:
        channels = diagnosis.layers[index].channels
        whole = channels <= left
        most[index] = channels if whole else _FARTHEST
        left -= channels if whole else 0

    def layer(row: Row) -> dict[str, Any]:
        measures = diagnosis.measures[row.number]
        held = diagnosis.channels[diagnosis.layers[row.number].path]
        return {
            "path": row.path,
            "health": row.health,
            **{name: _short(getattr(measures, name)) for name in ("shift", "log_scale", "divergence", "noise")},
            "order": measures.order,
            "gamma": histogram(held.weight),
            "beta": histogram(held.bias),
            "channels": against_population(held, most[row.number]),
        }

    return {
        "batch_size": diagnosis.conditions.batch_size,
        "chosen": next(iter(most)),
        "layers": [layer(row) for row in rows],
    }


def histogram(values: Tensor | None) -> dict[str, Any] | None:
    """How often which values are there."""
    if values is None:
        return None
    finite = values[values.isfinite()].double().flatten()
    found = {"number": values.numel(), "not_finite": values.numel() - len(finite)}
    if len(finite) == 0:
        return {**found, "low": 0.0, "high": 1.0, "counts": []}
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same: one bar as wide as can be read
        half = 0.05 * max(abs(low), 0.1)
        return {**found, "low": low - half, "high": low + half, "counts": [len(finite)]}
    bins = min(_BINS, max(5, len(finite) // 3))
    counts = torch.histc(finite, bins, low, high)
    return {**found, "low": _short(low), "high": _short(high), "counts": [int(count) for count in counts]}


def against_population(held: Channels, most: int) -> dict[str, Any] | None:
    """Running against population statistics of each channel; where there are more, of those farthest off."""
    vectors = (held.running_mean, held.running_var, held.mean, held.var)
    if any(v is None or v.dim() != 1 for v in vectors):
        return None
    running_mean, running_var, mean, var = (v.double() for v in vectors if v is not None)
    number = len(mean)
    index = torch.arange(number)
    if number > most:
        sigma = var.clamp_min(1e-30).sqrt()
        off = (running_mean - mean).abs() / sigma + (running_var.clamp_min(1e-30).sqrt() / sigma).log().abs()
        index = off.nan_to_num(torch.inf).argsort(descending=True)[:most].sort().values
    return {
        "number": number,
        "index": index.tolist(),
        "running_mean": [_short(v) for v in running_mean[index].tolist()],
        "running_var": [_short(v) for v in running_var[index].tolist()],
        "mean": [_short(v) for v in mean[index].tolist()],
        "var": [_short(v) for v in var[index].tolist()],
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _path(path: str) -> str:
    return path or "(model)"


def _span(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    return f"{number(pair[0])} … {number(pair[1])}" if all(map(math.isfinite, pair)) else "not finite"


def _with_unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{number(value)}{unit}"


def is_code(repair: str) -> bool:
    """Whether there is something to paste besides comments."""
    return any(line.strip() and not line.lstrip().startswith("#") for line in repair.splitlines())
