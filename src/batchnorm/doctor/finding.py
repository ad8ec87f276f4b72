"""What the doctor says: findings, how sure they are, and what could not be looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Severity(IntEnum):
    """How much a finding matters, by what it was measured to do."""

    NOTE = 1
    WARNING = 2
    ERROR = 3

    @property
    def label(self) -> str:
        """`note`, `warning` or `error`."""
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with, or worth knowing about, the batch normalization of a model.

    Attributes:
        code: Stable name of the rule, such as `BN102`; the documentation has a page for each.
        title: What is the matter, in a few words.
        severity: Note, warning or error; above note only by an effect that was measured, or that is certain.
        paths: The layers concerned, in the model's order; worst first where they are ranked.
        summary: One line with the figures that matter most.
        evidence: Further lines, each with figures.
        repair: Code to paste.
        confidence: `certain` for what follows from the model itself; `high`, `medium` or `low` by how much data
            there were. What is low is never an error.
        cost: What it costs as measured, such as `{"loss": 0.83}`; empty where that cannot be measured.
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
        code: Of the rule.
        title: What it looks for.
        reason: Why it could not be applied, and what it would need.
        paths: The layers that it leaves out; empty where it could not be applied at all.
    """

    code: str
    title: str
    reason: str
    paths: tuple[str, ...] = ()


def grouped(rules: Iterable[NotChecked]) -> dict[str, list[NotChecked]]:
    """What was not checked, by the reason."""
    found: dict[str, list[NotChecked]] = {}
    for rule in rules:
        found.setdefault(rule.reason, []).append(rule)
    return found


def left_out_lines(rules: Iterable[NotChecked]) -> list[str]:
    """A line for each reason: of several rules the codes, of one its title too."""
    return [
        f"{members[0].code} {members[0].title}: {reason}"
        if len(members) == 1
        else f"{', '.join(rule.code for rule in members)}: {reason}"
        for reason, members in grouped(rules).items()
    ]
