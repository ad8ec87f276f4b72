"""Findings are ordered by what explains what, and name the cause of statistics that do not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.doctor import Finding, Severity, diagnose
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


@pytest.mark.parametrize(("factor", "code"), [(0.5, "BN116"), (2.0, "BN103")])
def test_a_smaller_deviation_is_no_sign_of_other_data_if_weights_are_averages(factor: float, code: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(512, 8), torch.randint(10, (512,))
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, momentum=0.2), nn.ReLU(), nn.Linear(16, 10))
    for _ in range(20):
        model(x)
    average = AveragedModel(model)
    for _ in range(2):
        average.update_parameters(model)
    with torch.no_grad():
        average.module[0].weight *= factor
    data = list(zip(x.split(64), y.split(64), strict=True))
    found = diagnose(average, data, loss=F.cross_entropy, budget=0)
    assert {"BN103", "BN116"} & {finding.code for finding in found.findings} == {code}
