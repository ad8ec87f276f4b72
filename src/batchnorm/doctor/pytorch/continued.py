"""Continue the training for a few steps on a copy, to see how far running statistics lag at its learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from torch import nn
from torch.optim import Optimizer

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.cause import Cause
from batchnorm.doctor.measure.effect import Effect, effect_of
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.measuring import population_of
from batchnorm.doctor.pytorch.layers import layers_of, torch_statistics
from batchnorm.doctor.pytorch.measuring import modules_of
from batchnorm.doctor.pytorch.passes import Passes
from batchnorm.doctor.pytorch.training_step import StepError, as_step_error, loss_of
from batchnorm.doctor.wording import counted
from batchnorm.models.data.batches import Batches, device_of, own_copy
from batchnorm.models.execution.observe import put_running_statistics
from batchnorm.models.execution.progress import Bar
from batchnorm.walk import restored

# Largest number of steps. A running average remembers about 1/momentum batches.
_MOST_STEPS = 20


def add_lag(
    m: Measurements, model: nn.Module, optimizer: Optimizer | None, passes: Passes, modes: Sequence[bool]
) -> Measurements:
    """Find out whether the learning rate explains a misfit of unclear cause.

    If training continues from statistics that fit, and soon does the same harm, the learning rate explains it.

    Args:
        m: The measurements.
        model: The model.
        optimizer: The user's optimizer.
        passes: The passes over the data.
        modes: The mode of each module of the model before it was measured.
    """
    misfit = m.misfit
    if misfit is None or misfit.effect.severity == Severity.NOTE or not misfit.cause.may_be_lag:
        return m
    if optimizer is None:
        hint = "pass the optimizer (optimizer=) to find out whether the learning rate explains this"
        return replace(m, misfit=replace(misfit, cause=misfit.cause.with_evidence(hint)))
    steps = _memory(m.measured)
    if m.step is None or not steps or not _has_trained(optimizer):
        return m
    try:
        effect = _lag_after(steps, m, model, optimizer, passes, modes)
    except StepError as error:
        line = f"whether the learning rate explains this is unknown: it needs training steps on a copy, and {error}"
        return replace(m, misfit=replace(misfit, cause=misfit.cause.with_evidence(line)))
    if effect is None:
        return m
    line = f"statistics that fit, after {counted(steps, 'more step')} with this optimizer: {effect}"
    cause = misfit.cause.with_evidence(line)
    if effect.severity >= misfit.effect.severity:
        cause = Cause.lag(cause.evidence)
    return replace(m, misfit=replace(misfit, cause=cause))


def _memory(layers: Iterable[Layer]) -> int:
    """Return the number of batches that the running averages remember, at most 20; 0 if they forget none."""
    momenta = [layer.momentum for layer in layers if layer.momentum and math.isfinite(layer.momentum)]
    return min(_MOST_STEPS, math.ceil(1 / min(momenta))) if momenta else 0


def _has_trained(optimizer: Optimizer) -> bool:
    """Return whether the optimizer keeps the state of earlier steps, or has none to keep."""
    return bool(optimizer.state) or not any(group.get("momentum", True) for group in optimizer.param_groups)


def _lag_after(
    steps: int, m: Measurements, original: nn.Module, optimizer: Optimizer, passes: Passes, modes: Sequence[bool]
) -> Effect | None:
    """Return the effect of running statistics that fit the data, after further training steps on a copy.

    Raises:
        StepError: the model or the optimizer cannot be copied, or a step failed.
    """
    call = passes.call
    with as_step_error():
        model, optimizer = copy.deepcopy((original, optimizer))
    modules, measured = modules_of(model), m.measured
    for number, statistics in population_of(measured).items():
        put_running_statistics(modules[measured[number].path], torch_statistics(statistics))
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    if not m.training:
        model.train()
    # The user's `forward` and loss may hold the original, or further parameters.
    originals = [original, *([call.loss] if isinstance(call.loss, nn.Module) else [])]
    with restored(nn.ModuleList(originals), buffers=True, gradients=True), as_step_error(), torch.enable_grad():
        for given in passes.bar.over(islice(cycle(passes.kept), steps), "training steps on a copy", steps):
            batch = own_copy(given, device_of(model))
            optimizer.zero_grad()
            loss_of(call, call.forward(model, batch), batch).backward()
            optimizer.step()
    after = Passes(model.eval(), [layer for layer in layers_of(model) if layer.running is not None], call, 0, Bar())
    after.first(Batches(passes.kept, None))
    return effect_of(after.by_running, after.again(population_of(after.layers), "population statistics"))
