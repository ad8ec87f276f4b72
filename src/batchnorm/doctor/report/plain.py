"""Render the results of a diagnosis as text and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from batchnorm.doctor.finding import not_checked_lines
from batchnorm.doctor.measure.facts import LayerFacts
from batchnorm.doctor.report.results import Results
from batchnorm.doctor.wording import explain_command
from batchnorm.text import json_values, printable

# Increases by one when a field is removed or changes its meaning. A new field does not change it.
SCHEMA_VERSION = 1
_UNKNOWN = "?"


def displayed(results: Results) -> Results:
    """Return the results with all texts safe to print; paths of layers stay as they are."""
    findings = tuple(
        replace(
            finding,
            summary=printable(finding.summary),
            evidence=tuple(map(printable, finding.evidence)),
            repair=printable(finding.repair, lines=True),
        )
        for finding in results.findings
    )
    rules = tuple(replace(rule, reason=printable(rule.reason)) for rule in results.not_checked)
    return replace(results, model=printable(results.model), findings=findings, not_checked=rules)


def as_text(results: Results) -> str:
    """Return the report as text."""
    results = displayed(results)
    lines = [results.summary(), *([results.headline] if results.headline else [])]
    for finding in results.findings:
        sure = "" if finding.confidence == "certain" else f" [confidence {finding.confidence}]"
        lines += ["", f"{finding.severity.label} {finding.code} {finding.title}{sure}", f"    {finding.summary}"]
        lines += [f"    - {line}" for line in finding.evidence]
        lines += [f"    > {line}" for line in finding.repair.splitlines()]
        lines.append(f"    documentation: {explain_command(finding.code)}")
    if results.not_checked:
        lines += ["", "not checked:"]
        lines += [f"    {line}" for line in not_checked_lines(results.not_checked)]
    return "\n".join(lines)


def as_dict(results: Results) -> dict[str, Any]:
    """Return plain values, with None for numbers that are not finite."""
    found: dict[str, Any] = json_values(
        {
            "schema": SCHEMA_VERSION,
            "model": results.model,
            "healthy": results.healthy,
            "headline": results.headline,
            "samples": results.samples,
            "batches": results.batches,
            "findings": [{**vars(f), "severity": f.severity.label} for f in results.findings],
            "not_checked": [vars(rule) for rule in results.not_checked],
            "layers": [asdict(layer) for layer in results.layers],
            "measures": [asdict(layer) for layer in results.measures],
            "conditions": asdict(results.conditions),
        }
    )
    return found


def facts_as_text(layers: Iterable[LayerFacts]) -> list[dict[str, str]]:
    """Return the facts of each layer as text, by name, without the names that are unknown for all layers."""
    rows = [_facts_as_text(layer) for layer in layers]
    known = {name for row in rows for name, text in row.items() if text != _UNKNOWN}
    return [{name: text for name, text in row.items() if name in known} for row in rows]


def _facts_as_text(layer: LayerFacts) -> dict[str, str]:
    momentum = layer.momentum if layer.weight_of_old is None else layer.weight_of_old
    return {
        "kind": printable(f"{layer.kind}({layer.channels})"),
        "after": printable(layer.after) or _UNKNOWN,
        "before": printable(layer.before) or _UNKNOWN,
        "mode": "training" if layer.training else "evaluation",
        "momentum": "average" if momentum is None else f"{momentum:g}",
        "ε": f"{layer.eps:g}",
        "updates": _UNKNOWN if layer.updates is None else f"{layer.updates:,}",
        "γ": _range(layer.weight),
        "β": _range(layer.bias),
        "running mean": _range(layer.running_mean),
        "running variance": _range(layer.running_var),
        "dead channels": "–" if layer.dead is None else f"{layer.dead:.0%}",
        "foldable": _UNKNOWN if layer.foldable is None else "yes" if layer.foldable else "no",
        "parameters, buffers": f"{layer.parameters:,}, {layer.buffers:,}",
    }


def _range(pair: tuple[float, float] | None) -> str:
    if pair is None:
        return "–"
    return f"{pair[0]:.3g} … {pair[1]:.3g}".replace("-", "−") if all(map(math.isfinite, pair)) else "not finite"
