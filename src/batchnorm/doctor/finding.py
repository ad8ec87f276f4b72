"""Findings, their severity, and rules that could not be applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
