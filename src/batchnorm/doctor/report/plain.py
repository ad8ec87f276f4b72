"""Render the results of a diagnosis as text and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from batchnorm.doctor.finding import Finding, NotChecked, not_checked_lines
from batchnorm.doctor.report.results import Results

# Grows by one when a field is removed or changes its meaning; new fields leave it as it is.
SCHEMA_VERSION = 1


def as_text(results: Results) -> str:
    """Return the report as text."""
    lines = [results.summary()]
    for finding in results.findings:
        sure = "" if finding.confidence == "certain" else f" [confidence {finding.confidence}]"
        lines += ["", f"{finding.severity.label} {finding.code} {finding.title}{sure}", f"    {finding.summary}"]
        lines += [f"    - {line}" for line in finding.evidence]
        lines += [f"    > {line}" for line in finding.repair.splitlines()]
    if results.not_checked:
        lines += ["", "not checked:"]
        lines += [f"    {line}" for line in not_checked_lines(results.not_checked)]
    return "\n".join(lines)


def as_dict(results: Results) -> dict[str, Any]:
    """Return plain values, with None for numbers that are not finite."""
    found: dict[str, Any] = _plain(
        {
            "schema": SCHEMA_VERSION,
            "model": results.model,
            "healthy": results.healthy,
            "samples": results.samples,
            "batches": results.batches,
            "findings": [{**_fields(f), "severity": f.severity.label} for f in results.findings],
            "not_checked": [_fields(rule) for rule in results.not_checked],
            "layers": [asdict(layer) for layer in results.layers],
            "measures": [asdict(layer) for layer in results.measures],
            "conditions": asdict(results.conditions),
        }
    )
    return found


def _fields(item: Finding | NotChecked) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
