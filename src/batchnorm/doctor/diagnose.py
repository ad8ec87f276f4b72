"""The diagnosis, as a user calls it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchnorm.doctor.finding import Finding, NotChecked
from batchnorm.doctor.inspection import check_model, guessed
from batchnorm.doctor.measure.measures import left_out
from batchnorm.doctor.measure.passes import Data, Forward, Loss
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.measure.ranks import processes_of
from batchnorm.doctor.report.diagnosis import Diagnosis
from batchnorm.models.batches import Batches, check_data, default_forward, eager
from batchnorm.models.progress import bar
from batchnorm.walk import restored, set_mode


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    max_samples: int | None = 1000,
    budget: int = 5,
    process_group: Any = None,
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with the batch normalization of a model, with evidence and repair.

    It only reads: parameters, modes, buffers, gradients, hooks and the random state are as before, bit for bit, also
    after an exception. With data the model runs three times over them: normalized by the batch's statistics, by the
    running ones, and by the population's. One batch goes through a training step, backward pass included. Dropout and
    all else are in evaluation but in that step.

    Args:
        model: The network. In training it is taken as it is; in evaluation as its `train()` makes it.
        data: An iterable of batches as the model is trained on: a tensor, a tuple of inputs and targets, or a dict.
            Without data only what the model itself shows is looked at.
        loss: `loss(output, target)`, with the last part of a tuple as the target, else with the whole batch. Without
            it, costs are changes of the output, and nothing is an error because of them.
        optimizer: The one that trains the model.
        forward: `forward(model, batch)` calls the model and returns its output. By default with the tensor; with as
            many leading parts of a tuple as the model's `forward` requires arguments; with the keys of a dict that it
            names.
        max_samples: Stop after the batch that reaches this many samples; None reads all the data.
        budget: How many more passes over the data may be made to see what single layers cost.
        process_group: Compare what the processes of this group hold; each of them has to call this. None speaks to no
            other process.
        progress: Whether to show on standard error how long it will take and a bar (needs rich).

    Returns:
        What was found, worst first, and what could not be checked; prints as a report.

    Raises:
        TypeError: model is no module, data is no iterable of batches, or a batch does not fit the model's `forward`.
        ValueError: the model has no batch normalization, or layers that have not seen their first batch; an argument is
            out of its range; data end before the first batch.
        ImportError: progress without rich.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> diagnosis = diagnose(model, [torch.randn(8, 3, 16, 16) for _ in range(4)])
        >>> [finding.code for finding in diagnosis.findings if finding.code == "BN110"]
        ['BN110']
    """
    _check(model, data, max_samples, budget)
    inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    kept = nn.ModuleList([model, loss] if isinstance(loss, nn.Module) else [model])
    with restored(kept, buffers=True), bar("diagnose", progress) as shown, eager():
        probe = Probe.of(inner, optimizer, budget, shown)
        probe.processes = processes_of(process_group)
        if process_group is not None:
            probe.compare(process_group)
        elif probe.processes > 1:
            probe.missing["ranks"] = "needs the other processes (process_group= on each of them)"
        measured = Data(forward or default_forward("diagnose"), loss)
        if data is not None:
            probe.measure(measured, Batches(data, max_samples))
        set_mode(inner, training=False)
        probe.look(measured.example or guessed(inner))
        findings, not_checked = _apply(probe)
    return Diagnosis.of(probe, findings, not_checked)


def _apply(probe: Probe) -> tuple[list[Finding], list[NotChecked]]:
    from batchnorm.doctor.rules import RULES  # two dozen modules that `import batchnorm` does without

    not_checked: list[NotChecked] = []
    for rule in sorted(RULES, key=lambda rule: rule.last):
        reason = next((reason for need in rule.needs if (reason := probe.lacks(need)) is not None), None)
        if reason is not None:
            not_checked.append(NotChecked(rule.code, rule.title, reason))
        else:
            probe.found += rule().check(probe)
    not_checked.sort(key=lambda rule: rule.code)
    return sorted(probe.found, key=lambda finding: (-finding.severity, finding.code)), not_checked + left_out(probe)


def _check(model: nn.Module, data: Any, max_samples: int | None, budget: int) -> None:
    check_model("diagnose", model)
    if data is not None:
        check_data("diagnose", data)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"diagnose expects max_samples >= 1 or None, got {max_samples}. None reads all the data.")
    if budget < 0:
        raise ValueError(f"diagnose expects budget >= 0, got {budget}. 0 makes no pass for single layers.")
