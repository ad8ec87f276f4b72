"""Published networks are healthy, and defects planted into one of them are found."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import batchnorm
from batchnorm import walk
from batchnorm.doctor import Finding, Severity, diagnose
from tests.doctor.cases import RELATED
from tests.doctor.defective import AlwaysTraining, WithActivation
from tests.doctor.real_weights import digits_of, efficientnet, mobilenet, photographs

Batches = list[tuple[Tensor, Tensor]]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "mobilenet": (mobilenet, 64, 3),
    "efficientnet": (efficientnet, 64, 3),
    "usps": (lambda: digits_of("usps"), 16, 1),
    "svhn": (lambda: digits_of("svhn"), 32, 3),
}


@functools.cache
def _known(name: str) -> tuple[nn.Module, Batches]:
    """The network with the statistics of these photographs, and as their labels what it takes them for."""
    make, size, channels = NETWORKS[name]
    x = photographs(size, channels)
    model = batchnorm.recalibrate(make(), list(x.split(16))).model
    with torch.no_grad():
        labels = model.eval()(x).argmax(1)
    return model, list(zip(x.split(16), labels.split(16), strict=True))


def known(name: str) -> tuple[nn.Module, Batches]:
    model, data = _known(name)
    return copy.deepcopy(model).train(), data


def described(findings: Iterable[Finding]) -> list[str]:
    return [f"{finding.code} {finding.severity.label} {finding.summary}" for finding in findings]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_weights_alone_are_healthy(name: str, training: bool) -> None:
    found = diagnose(NETWORKS[name][0]().train(training))
    assert found.healthy, described(found.findings)


@pytest.mark.parametrize("name", NETWORKS)
def test_on_data_whose_statistics_they_hold_networks_are_healthy(name: str) -> None:
    model, data = known(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = diagnose(model, data, optimizer=optimizer)
    assert found.healthy, described(found.findings)
    assert {rule.code for rule in found.not_checked} <= {"BN215"}


# Planted ----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    model: nn.Module
    data: Batches | None
    options: dict[str, Any]


def norms(model: nn.Module) -> list[nn.Module]:
    return [found.module for found in walk.norm_layers(model)]


def _pruned(case: Case) -> None:
    for layer in [layer for layer in case.model.modules() if isinstance(layer, nn.Conv2d)]:
        prune.l1_unstructured(layer, "weight", 0.3)
        prune.remove(layer, "weight")


def _small(case: Case) -> None:
    assert case.data
    case.data = [pair for x, y in case.data for pair in zip(x.split(2), y.split(2), strict=True)]


def _offset(case: Case) -> None:
    """Behind a bias that is far above what varies."""
    block = case.model.features[1].conv[0]
    block[0].bias = nn.Parameter(torch.full((block[0].out_channels,), 1e4))
    block[1].running_mean += 1e4


def _shared(case: Case) -> None:
    """One layer for two places of equal width."""
    case.model.features[4].conv[1][1] = case.model.features[4].conv[0][1]
    case.data = None


def _biased(case: Case) -> None:
    convolution = case.model.features[7].conv[0][0]
    convolution.bias = nn.Parameter(torch.zeros(convolution.out_channels))
    case.data = None


def _padded(case: Case) -> None:
    assert case.data
    generator = torch.Generator().manual_seed(0)
    for x, _ in case.data:
        for image in x:
            height, width = torch.randint(24, 65, (2,), generator=generator).tolist()
            image[:, height:] = image[:, :, width:] = 0


def _poisoned(case: Case) -> None:
    norms(case.model)[20].running_var[7] = torch.nan
    case.data = None


def _decayed(case: Case) -> None:
    case.options["optimizer"] = torch.optim.SGD(case.model.parameters(), lr=0.1, weight_decay=1e-4)
    case.data = None


def _keras(case: Case) -> None:
    for layer in norms(case.model):
        layer.momentum = 0.99


def _epsilon(case: Case) -> None:
    norms(case.model)[30].eps = 1e-3
    case.data = None


def _dead(case: Case) -> None:
    with torch.no_grad():
        norms(case.model)[30].weight[::2] = 0
    case.data = None


def _half(case: Case) -> None:
    case.model.to(torch.bfloat16)
    case.data = None


def _untracked(case: Case) -> None:
    for layer in norms(case.model):
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    case.data = None


def _moving(case: Case) -> None:
    norms(case.model)[40].__class__ = AlwaysTraining


def _empty(case: Case) -> None:
    with torch.no_grad():
        case.model.features[9].conv[0][0].weight[:5] = 0


def _exploded(case: Case) -> None:
    with torch.no_grad():
        norms(case.model)[33].weight[4] = 1e4
    case.data = None


def _hidden(case: Case) -> None:
    norms(case.model)[3].__class__ = WithActivation
    case.data = None


def _deployed(case: Case) -> None:
    case.model.eval().requires_grad_(False)
    case.data = None


# `test_mistakes` plants those of BN101, BN103, BN105 to BN107, BN111 and BN201.
PLANTED: dict[str, tuple[Callable[[Case], None], Severity]] = {
    "BN102": (_pruned, Severity.WARNING),
    "BN104": (_small, Severity.NOTE),
    "BN108": (_offset, Severity.NOTE),
    "BN109": (_shared, Severity.NOTE),
    "BN110": (_biased, Severity.NOTE),
    "BN113": (_padded, Severity.WARNING),
    "BN202": (_poisoned, Severity.ERROR),
    "BN203": (_decayed, Severity.NOTE),
    "BN204": (_keras, Severity.WARNING),
    "BN205": (_epsilon, Severity.NOTE),
    "BN206": (_dead, Severity.NOTE),
    "BN207": (_half, Severity.NOTE),
    "BN208": (_untracked, Severity.NOTE),
    "BN209": (_moving, Severity.WARNING),
    "BN210": (_empty, Severity.NOTE),
    "BN211": (_exploded, Severity.NOTE),
    "BN212": (_hidden, Severity.NOTE),
    "BN213": (_deployed, Severity.NOTE),
}


@pytest.mark.parametrize("code", PLANTED)
def test_a_defect_planted_into_mobilenet_is_found(code: str) -> None:
    plant, severity = PLANTED[code]
    model, data = known("mobilenet")
    case = Case(model, [(x.clone(), y) for x, y in data], {"loss": F.cross_entropy})
    plant(case)
    found = diagnose(case.model, case.data, budget=1, **case.options).findings
    assert max((f.severity for f in found if f.code == code), default=0) >= severity, described(found)
    same = {other for other in PLANTED if PLANTED[other][0] is plant}
    # BN104 is correct here: sixteen photographs are few for the statistics of this network.
    assert {f.code for f in found if f.severity == Severity.ERROR} <= same | RELATED.get(code, set()) | {"BN104"}
