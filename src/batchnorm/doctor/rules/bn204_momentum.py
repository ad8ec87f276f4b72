"""BN204: a momentum that means the opposite elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

_LARGE = 0.9
# Error of the running mean, in standard deviations, that is more than a note.
_MATTERS = 0.1


class MomentumConvention(Rule):
    """In torch momentum is the weight of the new batch."""

    code = "BN204"
    title = "the momentum looks like another framework's"
    why = (
        "torch's momentum is the weight of the new batch (0.1); Keras', TensorFlow's and Flax's that of the old "
        "average (0.99, 0.9). Taken over as it is, the running statistics are those of the last batch alone."
    )
    repair = (
        "for found in batchnorm.walk.norm_layers(model):\n"
        "    found.module.momentum = 0.1  # or 1 less the other framework's\n"
        "model, report = batchnorm.recalibrate(model, training_data)"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """A momentum of 0.9 and more, and what it makes the running mean scatter by."""
        found = [layer for layer in probe.layers if layer.moves and _momentum(layer) >= _LARGE]
        if not found:
            return
        errors = [error for layer in found if (error := _scatter(probe, layer)) is not None]
        worst = max(errors, default=None)
        yield self.finding(
            Severity.WARNING if worst is not None and worst > _MATTERS else Severity.NOTE,
            [layer.path for layer in found],
            f"momentum {_momentum(found[0]):g} at {counted(len(found), 'layer')}: "
            f"{listed(layer.path for layer in found)}",
            evidence=[]
            if worst is None
            else [f"the running mean scatters by up to {worst:.2g}σ (median over the channels) from step to step"],
            scatter=worst,
        )


def _momentum(layer: Layer) -> float:
    momentum = getattr(layer.module, "momentum", None)
    return 0.0 if momentum is None else float(momentum)


def _scatter(probe: Probe, layer: Layer) -> float | None:
    if layer.samples is None or layer.population is None:
        return None
    a = _momentum(layer)
    error = layer.samples.error_of_mean(probe.batch_size) / (layer.population.var + layer.eps)
    return float(error.sqrt().median()) * math.sqrt(a / (2 - a))
