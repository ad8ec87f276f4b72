"""Ten mistakes in five networks: the first finding is the cause, and its fix, pasted, closes the gap.

Accuracy in evaluation is then at most one point below that in training, where the layers normalize by the batch, on the
same batches of 512 images, or on those that the fix loads.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchnorm
from batchnorm.doctor import Diagnosis, Finding, Severity, diagnose
from tests.doctor.mistakes import KINDS, MISTAKES, Batches, Mistake, batches, norms, trained

POINT = 0.01
# USPSNet has two layers. Dropout before the second one changes its loss by less than a tenth.
HARMLESS = {("usps", "dropout before")}


@torch.no_grad()
def accuracy(model: nn.Module, data: Batches, domains: tuple[int, ...] = ()) -> float:
    contexts = [batchnorm.use_domain(domain) for domain in domains] or [nullcontext()] * len(data)
    right = 0
    for (x, y), context in zip(data, contexts, strict=True):
        with context:
            right += int((model(x).argmax(1) == y).sum())
    return right / sum(len(y) for _, y in data)


def in_training(model: nn.Module) -> nn.Module:
    """Return a copy whose layers normalize by the batch, without dropout."""
    model = copy.deepcopy(model).eval()
    for layer in norms(model):
        layer.train()
    return model


def pasted(finding: Finding, mistake: Mistake) -> dict[str, Any]:
    """Run the fix as printed, with the user's objects under the names that it uses; return all names afterwards."""
    names = {"batchnorm": batchnorm, "torch": torch, "model": mistake.model, "training_data": mistake.data}
    names |= {"data": mistake.data}
    exec(compile(finding.repair, finding.code, "exec"), names)
    return names


def described(found: Diagnosis) -> str:
    return "\n".join(f"{f.code} {f.severity.label} {f.summary}" for f in found.findings)


@pytest.mark.parametrize("network", KINDS)
def test_without_a_mistake_nothing_is_above_a_note(network: str) -> None:
    found = diagnose(trained(network), batches(network), loss=F.cross_entropy, budget=1)
    assert found.healthy, described(found)
    assert not {f.code for f in found.findings} & {code for _, code in MISTAKES.values()}


@pytest.mark.parametrize("network", KINDS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_cause_comes_first_and_its_fix_closes_the_gap(mistake: str, network: str) -> None:
    torch.manual_seed(0)
    plant, code = MISTAKES[mistake]
    planted = plant(network)
    found = diagnose(planted.model, planted.data, loss=F.cross_entropy, budget=1, **planted.options)
    if (network, mistake) in HARMLESS:
        assert found.healthy and code in {f.code for f in found.findings}, described(found)
        return
    first = found.findings[0]
    assert first.code == code, described(found)
    gap = next((f for f in found.findings if f.code == "BN101"), None)
    if gap is not None and gap.severity > Severity.NOTE:
        assert gap.causes[0] == code and code in found.headline
    names = pasted(first, planted)
    model, data, domains = names["model"], names["training_data"], ()
    if "loader" in names:
        data = list(names["loader"])
    if code == "BN115":
        domains = first.figures["domains"]
    if "evaluate" in planted.options:
        assert planted.options["evaluate"](model) >= accuracy(in_training(model), data) - POINT
        return
    assert accuracy(copy.deepcopy(model).eval(), data, domains) >= accuracy(in_training(model), data, domains) - POINT


FIRST_LINES = {
    "momentum of 0.001 over 189 steps": "momentum 0.001 over 189 steps keeps 83% of the initial running statistics",
    "evaluation in training mode": "the evaluation runs in training mode, without model.eval(): it normalizes by",
    "two domains in turn": "8 batches come from 2 domains in turn, whose means are",
    "checkpointed": "activation checkpointing runs 3 layers again in the backward pass, and updates the running "
    "statistics twice a step",
    "averaged weights": "the weights are averages, but the running statistics belong to other weights",
    "another scale in evaluation": "by a factor of 25",
}


@pytest.mark.parametrize("mistake", FIRST_LINES)
def test_the_first_line_names_the_cause_with_its_figures(mistake: str) -> None:
    torch.manual_seed(0)
    planted = MISTAKES[mistake][0]("perceptron")
    found = diagnose(planted.model, planted.data, loss=F.cross_entropy, budget=0, **planted.options)
    lines = str(found).splitlines()[1:]
    assert FIRST_LINES[mistake] in next(line for line in lines if line.startswith("    "))
    if found.headline:
        assert lines[0] == found.headline and lines[0].startswith("evaluation loss ")
        assert FIRST_LINES[mistake] in lines[0]
    if mistake == "checkpointed":
        assert found.worst == Severity.ERROR
