"""Findings, their severity, and rules that could not be applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Severity(IntEnum):
    """How much a finding matters, by its measured effect."""

    NOTE = 1
    WARNING = 2
    ERROR = 3

    @property
    def label(self) -> str:
        """`note`, `warning` or `error`."""
        return self.name.lower()


def one_less(severity: Severity) -> Severity:
    """Return the next lower severity, at least a note."""
    return Severity(max(severity - 1, Severity.NOTE))


@dataclass(frozen=True)
class Finding:
    """One problem of a model's batch normalization, or one fact worth knowing about it.

    Attributes:
        code: Stable code of the rule, such as `BN102`; the documentation has a page for each.
        title: The problem in a few words.
        severity: Note, warning or error. It is above a note only if the effect was measured or is certain.
        paths: The affected layers, worst first if they are ranked, otherwise in the model's order.
        summary: One line with the most important figures.
        evidence: Further lines with figures.
        repair: Code to paste.
        confidence: `certain` if it follows from the model itself; otherwise `high`, `medium` or `low`, by the amount of
            data. A finding of low confidence is never an error.
        cost: The measured cost, such as `{"loss": 0.83}`; empty if it cannot be measured.
        figures: The evidence for programs.
        causes: The codes of the findings that explain this one.
    """

    code: str
    title: str
    severity: Severity
    paths: tuple[str, ...]
    summary: str
    evidence: tuple[str, ...] = ()
    repair: str = ""
    confidence: str = "certain"
    cost: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    causes: tuple[str, ...] = ()


def causes_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings, worst first, and each one after its causes.

    A cause ranks as high as the worst finding that it explains, directly or through another one. Of findings that rank
    alike, above a note, those that follow from the model itself come first, and then those that explain others.
    """
    direct: dict[str, set[str]] = {}
    for finding in findings:
        direct.setdefault(finding.code, set()).update(finding.causes)

    def causes_of(code: str) -> set[str]:
        return direct.get(code, set()).union(*map(causes_of, direct.get(code, ())))

    every = {code: causes_of(code) for code in direct}
    worst = {code: max(f.severity for f in findings if f.code == code) for code in direct}
    rank = {code: max(worst[c] for c in direct if c == code or code in every[c]) for code in direct}

    def key(finding: Finding) -> tuple[int, int, bool, int, str]:
        leads = finding.severity == worst[finding.code]
        ranked = rank[finding.code] if leads else finding.severity
        explained = sum(finding.code in causes for causes in every.values())
        certain = finding.confidence == "certain" and ranked > Severity.NOTE
        return -ranked, len(every[finding.code]), not certain, -explained, finding.code

    return sorted(findings, key=key)


@dataclass(frozen=True)
class NotChecked:
    """A rule that could not be applied, or not to all layers.

    Attributes:
        code: The code of the rule.
        title: The title of the rule.
        reason: Why it could not be applied, and what it needs.
        paths: The layers that are left out; empty if the rule could not be applied at all.
    """

    code: str
    title: str
    reason: str
    paths: tuple[str, ...] = ()


def by_reason(rules: Iterable[NotChecked]) -> dict[str, list[NotChecked]]:
    """Group the rules that were not checked by the reason."""
    found: dict[str, list[NotChecked]] = {}
    for rule in rules:
        found.setdefault(rule.reason, []).append(rule)
    return found


def not_checked_lines(rules: Iterable[NotChecked]) -> list[str]:
    """Return a line for each reason, with the codes of its rules, and the title if there is only one."""
    return [
        f"{members[0].code} {members[0].title}: {reason}"
        if len(members) == 1
        else f"{', '.join(rule.code for rule in members)}: {reason}"
        for reason, members in by_reason(rules).items()
    ]
