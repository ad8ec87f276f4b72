from __future__ import annotations

import math
from statistics import median

import numpy as np

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, times

# A warning if the additional updates add more than this error to the running mean, in standard deviations.
_MATTERS = 0.05


class MovedTwice(Rule):
    code = "BN106"
    title = "running statistics are updated more than once in a training step"
    why = """
        Activation checkpointing runs a layer again in the backward pass. A loss that calls the model twice runs all
        layers twice. Each run updates the statistics, so the effective momentum is not the one that was chosen.
    """
    evidence = """
        One training step on the first batch, with its backward pass and without its update, which is then undone. Every
        call of a layer that changes its running statistics is counted, before and during the backward pass. No step is
        made if the parameters have hooks that start an update.
    """
    severity = """
        An error if the backward pass updates the statistics, because activation checkpointing must not change the
        training. For a model that is called several times, decided by the additional scatter of the running mean, in
        standard deviations: a warning from 0.05σ. Two updates by the same batch turn a momentum of 0.1 into 0.19.
    """
    repair = "model, report = batchnorm.accelerate(model)  # its layers are not updated in a backward pass"
    source = """
        PyTorch's documentation of `torch.utils.checkpoint`; Chen et al. 2016, *Training Deep Nets with Sublinear Memory
        Cost*.
    """
    needs = ("step",)

    def check(self, m: Measurements) -> Findings:
        step = m.step
        assert step is not None
        again = [layer for layer in m.layers if step.backward.get(layer.path)]
        if again:
            updates = {layer.path: 1 + step.backward[layer.path] for layer in again}
            yield self.finding(
                Severity.ERROR,
                updates,
                f"activation checkpointing runs {counted(len(again), 'layer')} again in the backward pass, and updates "
                f"the running statistics {times(max(updates.values()))} a step: {listed(updates)}",
                evidence=[_effective_momentum(again[0], updates[again[0].path])],
                updates=updates,
            )
        each = [layer for layer in m.layers if step.forward.get(layer.path, 0) > 1]
        if step.model_calls > 1 and each:
            yield self.finding(
                _severity(m, each, step.model_calls),
                [layer.path for layer in each],
                f"a step calls the model {times(step.model_calls)}, and updates {counted(len(each), 'layer')} each "
                "time",
                evidence=[_effective_momentum(each[0], step.model_calls)],
                repair="model, report = batchnorm.accelerate(model)  # to layers whose updates can be switched off\n"
                "with batchnorm.update_running_stats(model, False):\n"
                "    pass  # the passes that should not count",
                calls=step.model_calls,
            )


def _effective_momentum(layer: Layer, times: int) -> str:
    if layer.momentum is None:
        return "with momentum=None each batch counts more than once in the average"
    return f"momentum {layer.momentum:g} acts as {1 - (1 - layer.momentum) ** times:.3g}"


def _severity(m: Measurements, layers: list[Layer], times: int) -> Severity:
    added = [error for layer in layers if (error := _added_error(layer, times, m.batch_size)) is not None]
    return Severity.WARNING if added and median(added) > _MATTERS else Severity.NOTE


def _added_error(layer: Layer, times: int, batch_size: float) -> float | None:
    """Return by how much more the running mean scatters, in standard deviations."""
    scatter = layer.scatter(batch_size)
    if layer.momentum is None or scatter is None:
        return None
    effective = 1 - (1 - layer.momentum) ** times
    factors = [math.sqrt(momentum / (2 - momentum)) for momentum in (effective, layer.momentum)]
    return float(np.sqrt(np.square(scatter).mean())) * (factors[0] - factors[1])
