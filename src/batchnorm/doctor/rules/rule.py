"""The base class of the rules."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.measure.measurements import Measurements

# The names that most rules import.
__all__ = ["Finding", "Findings", "Measurements", "Rule", "Severity"]

Findings = Iterator[Finding]


class Rule(ABC):
    """One problem that the doctor looks for.

    A rule documents itself: its page in the documentation is generated from the attributes. They are Markdown, except
    for `title`, `why` and the repairs, and may be indented. The tests require a planted and a healthy case of every
    rule.

    Attributes:
        code: `BN1xx` if the effect is measured with data, `BN2xx` if the model itself shows the problem.
        title: The problem in a few words.
        why: Why it matters; the HTML report shows it too.
        evidence: How it is found.
        severity: The conditions for each severity.
        repair: Code to paste.
        repair_keras: The code for a Keras model; empty if the rule is not applied to Keras models.
        notes: Limits, or more about the fix.
        source: Publications that describe it.
        needs: Measurements that the rule requires, among "data", "output", "step", "trace", "pass", "optimizer" and
            "ranks"; "step or trace" if one of them is enough.
        causes: Codes of the rules whose findings explain a finding of this rule, the most likely cause first.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    why: ClassVar[str]
    evidence: ClassVar[str]
    severity: ClassVar[str]
    repair: ClassVar[str]
    repair_keras: ClassVar[str] = ""
    notes: ClassVar[str] = ""
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    causes: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for name in ("why", "evidence", "severity", "repair", "repair_keras", "notes", "source"):
            setattr(cls, name, inspect.cleandoc(getattr(cls, name)))
        cls.why = " ".join(cls.why.split())

    @abstractmethod
    def check(self, m: Measurements) -> Findings:
        """Find the problem in measurements that meet the rule's needs."""

    def revise(self, finding: Finding, findings: Sequence[Finding]) -> Finding:
        """Return a finding of this rule, revised after all rules were applied: by default, with its causes."""
        found = {other.code for other in findings if other.severity >= min(finding.severity, Severity.WARNING)}
        causes = tuple(code for code in self.causes if code in found)
        explained = (f"explained by {' and '.join(causes)}",) if causes else ()
        return replace(finding, causes=causes, evidence=(*explained, *finding.evidence))

    def repair_from(self, line: str) -> str:
        """Return the repair with another first line."""
        return "\n".join([line, *self.repair.splitlines()[1:]])

    def finding(
        self,
        severity: Severity,
        paths: Iterable[str],
        summary: str,
        *,
        effect: Effect | None = None,
        evidence: Iterable[str] = (),
        confidence: str = "certain",
        cost: Mapping[str, float] | None = None,
        repair: str | None = None,
        **figures: Any,
    ) -> Finding:
        """Return a finding of this rule, with the confidence and cost of its effect, if it has one.

        With low confidence, an error becomes a warning.
        """
        if effect is not None:
            confidence, cost = effect.confidence, effect.cost
        if confidence == "low":
            severity = min(severity, Severity.WARNING)
        return Finding(
            self.code,
            self.title,
            severity,
            tuple(paths),
            summary,
            tuple(evidence),
            self.repair if repair is None else repair,
            confidence,
            cost or {},
            figures,
        )
