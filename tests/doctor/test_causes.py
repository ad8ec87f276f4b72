"""Findings are ordered by what explains what."""

from __future__ import annotations

import pytest

from batchnorm.doctor import Finding, Severity
from batchnorm.doctor.finding import causes_first
from batchnorm.doctor.rules import load_rules


def planted(code: str, severity: Severity, *causes: str, confidence: str = "high") -> Finding:
    return Finding(code, "", severity, (), "", confidence=confidence, causes=causes)


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([planted("BN1", Severity.ERROR, "BN2"), planted("BN2", Severity.NOTE)], ["BN2", "BN1"]),
        ([planted("BN1", Severity.WARNING), planted("BN2", Severity.ERROR)], ["BN2", "BN1"]),
        ([planted("BN1", Severity.WARNING), planted("BN2", Severity.WARNING, confidence="certain")], ["BN2", "BN1"]),
        (
            [
                planted("BN1", Severity.WARNING),
                planted("BN2", Severity.WARNING),
                planted("BN3", Severity.WARNING, "BN2"),
            ],
            ["BN2", "BN1", "BN3"],
        ),
    ],
    ids=["a cause before what it explains", "the worst first", "certain first", "one that explains another first"],
)
def test_findings_are_ordered_by_what_explains_what(findings: list[Finding], expected: list[str]) -> None:
    for given in (findings, findings[::-1]):
        assert [finding.code for finding in causes_first(given)] == expected


def test_no_rule_is_a_cause_of_itself_through_others() -> None:
    direct = {rule.code: rule.causes for rule in load_rules()}
    assert all(code in direct for causes in direct.values() for code in causes)
    for start in direct:
        reached, waiting = set[str](), list(direct[start])
        while waiting:
            code = waiting.pop()
            if code not in reached:
                reached.add(code)
                waiting += direct[code]
        assert start not in reached
