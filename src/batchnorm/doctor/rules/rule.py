"""What every rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.probe import Probe


class Rule(ABC):
    """One thing that can be wrong.

    Its healthy and its planted case are in the tests, which demand them of every rule: they train networks.
    """

    code: ClassVar[str]
    title: ClassVar[str]
    why: ClassVar[str]
    repair: ClassVar[str]
    # Of what a probe may lack ("data", "output", "step", "trace", "pass", "optimizer", "ranks"), what the rule cannot
    # do without; where several will do, with "or" between.
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether it is applied after the others, and sees what they found.
    last: ClassVar[bool] = False

    @abstractmethod
    def check(self, probe: Probe) -> Iterable[Finding]:
        """What the rule finds."""

    def finding(
        self,
        severity: Severity,
        paths: Iterable[str],
        summary: str,
        *,
        evidence: Iterable[str] = (),
        confidence: str = "certain",
        cost: Mapping[str, float] | None = None,
        repair: str | None = None,
        **figures: Any,
    ) -> Finding:
        """A finding of this rule; what is unsure is no error."""
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
