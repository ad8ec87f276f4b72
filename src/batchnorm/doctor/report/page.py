"""Render the results of a diagnosis as an HTML page with a verdict, a strip of layers, findings and charts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markdown_it import MarkdownIt
from markupsafe import Markup

from batchnorm.doctor.finding import Finding, Severity, by_reason
from batchnorm.doctor.measure.facts import Channels, LayerFacts, LayerMeasures
from batchnorm.doctor.measure.layers import Array
from batchnorm.doctor.report.plain import displayed, facts_as_text
from batchnorm.doctor.report.results import Results
from batchnorm.doctor.wording import counted, named, signed
from batchnorm.page import number, render, short
from batchnorm.rule_texts import rule_texts

# Number of channels for which the page shows all channels of a layer, worst layers first; about 1 MB.
_CHANNELS = 32_768
# Number of channels that it shows of each further layer: the channels that are farthest off.
_FARTHEST = 64
_BINS = 30
# Largest number of parts that the strip of layers is divided into.
_PARTS = 16
# The costs that a finding can have, in words.
_COSTS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {signed(value)}",
    "other_class": lambda value: f"{value:.1%} of the predictions change",
    "parameters": lambda value: f"{value:,.0f} parameters",
    "error": lambda value: f"error of {value:.2g}σ",
    "padding": lambda value: f"{value:.0%} of the positions are padding",
}


@dataclass(frozen=True)
class Row:
    """A layer in the strip and in the table.

    Attributes:
        number: Its number in the model's order.
        path: Its path.
        health: `ok`, or the worst severity of its findings.
        findings: The findings that name it or the layer that computes its input.
        facts: Its facts in words, by name.
    """

    number: int
    path: str
    health: str
    findings: tuple[Finding, ...]
    facts: dict[str, str]


def as_html(results: Results) -> str:
    """Return the page."""
    results = displayed(results)
    rows = rows_of(results)
    ranks = ranked(results, rows)
    return render(
        "batchnorm.doctor.report",
        charts(results, rows, ranks),
        {"path": named},
        diagnosis=results,
        conditions=results.conditions,
        verdict=verdict(results),
        start=next((finding for finding in results.findings if is_code(finding.repair)), None),
        rows=rows,
        parts=parts(rows),
        chosen=ranks[0],
        why={code: text.why for code, text in rule_texts().items()},
        titles={code: text.title for code, text in rule_texts().items()},
        documentation=documentation(results),
        compared=sum(measures.divergence is not None for measures in results.measures),
        noisy=sum(measures.noise is not None for measures in results.measures),
        measured=results.batches > 0,
        cost=cost,
        not_checked=by_reason(results.not_checked),
        is_code=is_code,
        counted=counted,
    )


def verdict(results: Results) -> list[str]:
    """Return the result of the diagnosis in sentences."""
    layers = f"{counted(len(results.layers), 'layer')} of batch normalization"
    number_of = {s: sum(finding.severity == s for finding in results.findings) for s in Severity}
    if results.healthy:
        notes = f"; {counted(number_of[Severity.NOTE], 'note')}" if results.findings else ""
        found = [f"Nothing above a note was found in the {layers} of {results.model}{notes}."]
    else:
        counts = [counted(number_of[s], s.label) for s in (Severity.ERROR, Severity.WARNING) if number_of[s]]
        first = results.findings[0]
        found = [f"{results.model} has {' and '.join(counts)} in its {layers}."]
        if results.headline:
            found += [_sentence(finding.summary) for finding in results.findings[1:] if finding.code == "BN101"]
        found.append(f"{first.code}: {first.title}. {_sentence(first.summary)}")
    if not results.batches:
        found.append("No data were given, so only the model itself was examined.")
    elif not results.conditions.loss:
        found.append("There is no loss: costs are changes of the output, and an effect is at most a warning.")
    elif results.conditions.loss_source:
        found.append(f"The loss comes {results.conditions.loss_source}.")
    whole = sum(not rule.paths for rule in results.not_checked)
    if whole:
        found.append(f"{counted(whole, 'rule')} could not be applied; the reasons are at the end.")
    return found


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def documentation(results: Results) -> dict[str, Markup]:
    """Return the documentation of each code on the page as HTML, whose links stay on the page."""
    texts = rule_texts()
    codes = sorted({finding.code for finding in results.findings} | {rule.code for rule in results.not_checked})
    markdown = MarkdownIt("commonmark", {"html": False})
    found = {}
    for code in codes:
        _, _, text = texts[code].markdown().partition("\n\n")  # the page shows the title itself
        text = re.sub(r"\[(BN\d+)\]\(bn\d+\.md\)", lambda link: _link(link[1], codes), text)
        found[code] = Markup(markdown.render(re.sub(r"^## ", "### ", text, flags=re.MULTILINE)))
    return found


def _link(code: str, codes: Iterable[str]) -> str:
    return f"[{code}](#rule-{code})" if code in codes else code


def cost(finding: Finding) -> list[str]:
    """Return the costs of a finding in words."""
    return [_COSTS[name](value) for name, value in finding.cost.items()]


# The strip and the table -------------------------------------------------------------------------------------------


def rows_of(results: Results) -> list[Row]:
    """Return the layers, in the model's order."""
    rows = []
    facts = facts_as_text(results.layers)
    for index, (layer, measures) in enumerate(zip(results.layers, results.measures, strict=True)):
        findings = tuple(finding for finding in results.findings if _names(finding, layer))
        worst = max((finding.severity for finding in findings), default=None)
        rows.append(
            Row(
                index,
                named(layer.path),
                "ok" if worst is None else worst.label,
                findings,
                {**facts[index], **_measures_as_text(measures)},
            )
        )
    return rows


def _names(finding: Finding, layer: LayerFacts) -> bool:
    own = {layer.path, *layer.also}
    return any(path in own or (path and layer.after.startswith(f"{path} (")) for path in finding.paths)


def _measures_as_text(measures: LayerMeasures) -> dict[str, str]:
    return {
        "running mean off": _with_unit(measures.shift, "σ"),
        "divergence": _with_unit(measures.divergence, " nats"),
        "batch noise": _with_unit(measures.noise, "σ"),
    }


def parts(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Group the layers by the part of the network, at the first level of names that separates parts."""
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


def ranked(results: Results, rows: list[Row]) -> list[int]:
    """Return the numbers of the layers, worst first: by severity, then by divergence."""
    severity = {"ok": 0} | {s.label: int(s) for s in Severity}

    def rank(row: Row) -> tuple[float, float]:
        return -severity[row.health], -(results.measures[row.number].divergence or 0.0)

    return [row.number for row in sorted(rows, key=rank)]


# The charts --------------------------------------------------------------------------------------------------------


def charts(results: Results, rows: list[Row], ranks: Iterable[int]) -> dict[str, Any]:
    """Return the data that the page's script draws."""
    most = {}
    left = _CHANNELS
    for index in ranks:
        channels = results.layers[index].channels
        whole = channels <= left
        most[index] = channels if whole else _FARTHEST
        left -= channels if whole else 0

    def layer(row: Row) -> dict[str, Any]:
        measures = results.measures[row.number]
        channels = results.channels[results.layers[row.number].path]
        return {
            "path": row.path,
            "health": row.health,
            **{name: _short_or_none(getattr(measures, name)) for name in ("shift", "log_scale", "divergence", "noise")},
            "order": measures.order,
            "gamma": histogram(channels.weight),
            "beta": histogram(channels.bias),
            "channels": against_population(channels, most[row.number]),
        }

    return {
        "batch_size": results.conditions.batch_size,
        "chosen": next(iter(most)),
        "layers": [layer(row) for row in rows],
    }


def histogram(values: Array | None) -> dict[str, Any] | None:
    """Return a histogram of the values."""
    if values is None:
        return None
    finite = values[np.isfinite(values)]
    found = {"number": values.size, "not_finite": values.size - finite.size}
    if finite.size == 0:
        return {**found, "low": 0.0, "high": 1.0, "counts": []}
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all equal: one bar of a readable width
        half = 0.05 * max(abs(low), 0.1)
        return {**found, "low": low - half, "high": low + half, "counts": [finite.size]}
    counts, _ = np.histogram(finite, min(_BINS, max(5, finite.size // 3)), (low, high))
    return {**found, "low": short(low), "high": short(high), "counts": counts.tolist()}


@np.errstate(all="ignore")  # values may not be finite
def against_population(channels: Channels, most: int) -> dict[str, Any] | None:
    """Return running and population statistics of each channel, or of the `most` channels that are farthest off."""
    vectors = (channels.running_mean, channels.running_var, channels.mean, channels.var)
    if any(v is None or v.ndim != 1 for v in vectors):
        return None
    running_mean, running_var, mean, var = (v for v in vectors if v is not None)
    number = len(mean)
    index = np.arange(number)
    if number > most:
        sigma = np.sqrt(np.maximum(var, 1e-30))
        scale = np.log(np.sqrt(np.maximum(running_var, 1e-30)) / sigma)
        distance = np.abs(running_mean - mean) / sigma + np.abs(scale)
        index = np.sort(np.argsort(-np.nan_to_num(distance, nan=np.inf), kind="stable")[:most])
    return {
        "number": number,
        "index": index.tolist(),
        "running_mean": [short(v) for v in running_mean[index].tolist()],
        "running_var": [short(v) for v in running_var[index].tolist()],
        "mean": [short(v) for v in mean[index].tolist()],
        "var": [short(v) for v in var[index].tolist()],
    }


def _short_or_none(value: float | None) -> float | None:
    return None if value is None else short(value)


def _with_unit(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{number(value)}{unit}"


def is_code(repair: str) -> bool:
    """Return whether there is code besides comments."""
    return any(line.strip() and not line.lstrip().startswith("#") for line in repair.splitlines())
