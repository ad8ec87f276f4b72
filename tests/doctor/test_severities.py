"""Findings on both sides of a threshold of their rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.doctor import Severity, diagnose
from tests.doctor.cases import table


@pytest.mark.parametrize(("size", "severity"), [(2, Severity.WARNING), (16, Severity.NOTE)])
def test_a_model_called_twice_is_a_warning_if_its_running_mean_scatters_more(size: int, severity: Severity) -> None:
    def twice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x) + model(-x)

    model, data = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), list(torch.randn(30, size, 6))
    (found,) = [finding for finding in diagnose(model, data, forward=twice).findings if finding.code == "BN106"]
    assert found.severity == severity


@pytest.mark.parametrize(
    ("seconds", "severity"), [(3e7, Severity.NOTE), (3e8, Severity.WARNING), (1.7e9, Severity.ERROR)]
)
def test_the_error_that_a_large_mean_causes_decides_the_severity(seconds: float, severity: Severity) -> None:
    case = table(seconds)
    (found,) = [finding for finding in diagnose(case.model, case.data).findings if finding.code == "BN108"]
    assert found.severity == severity
