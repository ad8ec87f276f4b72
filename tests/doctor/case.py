"""A model with its data, as the doctor gets it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from batchnorm.doctor import Severity
from tests.doctor.networks import batches, criterion, trained

Batches = list[tuple[Tensor, Tensor]] | None


@dataclass(frozen=True)
class Case:
    """A model and data to diagnose, and the severity of the planted defect."""

    model: nn.Module
    data: Batches
    options: dict[str, Any] = field(default_factory=dict)
    severity: Severity = Severity.NOTE
    around: Callable[[], AbstractContextManager[None]] = nullcontext


def healthy() -> Case:
    return Case(trained("plain"), batches(), {"loss": criterion})


def norms(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
