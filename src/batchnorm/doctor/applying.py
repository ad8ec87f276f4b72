"""Apply the rules to the measurements of a model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from batchnorm.doctor.finding import Finding, NotChecked, causes_first
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.rules import Rule
from batchnorm.doctor.wording import counted, listed


@np.errstate(all="ignore")
def apply_rules(m: Measurements, rules: Iterable[type[Rule]]) -> tuple[list[Finding], list[NotChecked]]:
    """Return the findings, worst first and causes before what they explain, and the rules whose needs are not met."""
    findings: list[Finding] = []
    not_checked: list[NotChecked] = []
    by_code = {rule.code: rule() for rule in rules}
    for rule in by_code.values():
        reason = next((reason for need in rule.needs if (reason := m.lacks(need)) is not None), None)
        if reason is not None:
            not_checked.append(NotChecked(rule.code, rule.title, reason))
        else:
            findings += rule.check(m)
    return causes_first([by_code[finding.code].revise(finding, findings) for finding in findings]), not_checked


def layers_left_out(m: Measurements) -> list[NotChecked]:
    """Return the layers that could not be compared with the population of the data, by reason."""
    if "data" in m.missing:
        return []
    compared = {distance.layer for distance in m.distances}
    reasons: dict[str, list[str]] = {}
    for layer in m.layers:
        if layer not in compared:
            reasons.setdefault(_reason(layer), []).append(layer.path)
    return [
        NotChecked(
            "BN102",
            "running statistics against the population",
            f"leaves out {counted(len(paths), 'layer')} ({listed(paths)}), as do BN103 and BN104: {reason}",
            tuple(paths),
        )
        for reason, paths in reasons.items()
    ]


def _reason(layer: Layer) -> str:
    kind = layer.kind
    if layer.running is None:
        if layer.whitens:
            return f"{kind} whitens, and keeps a matrix instead of variances"
        return f"{kind} keeps no running mean and variance here"
    if len(layer.running.mean) != 1:
        return f"{kind} keeps statistics of {len(layer.running.mean)} domains, each with a population of its own"
    if not layer.calls:
        return "these data did not reach it"
    if not bool(np.isfinite(layer.running.mean + layer.running.var).all()):
        return "the running statistics are not finite"
    if layer.population is None:
        return "its input is not finite, or has a single value per channel"
    return "the first dimension of its input is not the dimension of the samples"
