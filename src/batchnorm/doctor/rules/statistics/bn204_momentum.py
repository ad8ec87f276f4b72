from __future__ import annotations

import math

from batchnorm.doctor.measure.layers import Layer, median
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed

_LARGE = 0.9
# A warning if the running mean scatters by more than this, in standard deviations.
_MATTERS = 0.1


class MomentumConvention(Rule):
    code = "BN204"
    title = "the momentum looks like another framework's"
    why = """
        torch's momentum is the weight of the new batch (0.1). The momentum of Keras, TensorFlow and Flax is the weight
        of the old average (0.99, 0.9). With a value of the other convention, the running statistics are nearly those of
        the last batch alone.
    """
    evidence = """
        A weight of the new batch of 0.9 or more in a layer whose statistics are updated. With data, also the scatter of
        the running mean from step to step, which is √(a/(2 - a)) times that of a batch mean for a weight of a.
    """
    severity = "A warning if the running mean scatters by more than 0.1σ."
    repair = """
        for found in batchnorm.walk.norm_layers(model):
            found.module.momentum = 0.1  # or 1 minus the other framework's
        model, report = batchnorm.recalibrate(model, training_data)
    """
    repair_keras = """
        model, report = batchnorm.keras.convert(model, momentum=0.9)  # or 1 minus the other framework's
        model, report = batchnorm.keras.recalibrate(model, training_data)
    """
    source = """
        The mathematics page, “Running statistics”; Keras' and Flax's documentation of `BatchNormalization` and
        `BatchNorm`.
    """

    def check(self, m: Measurements) -> Findings:
        found = {
            layer: momentum
            for layer in m.layers
            if layer.updates_running and (momentum := layer.momentum or 0.0) >= _LARGE
        }
        if not found:
            return
        errors = [error for layer, momentum in found.items() if (error := _scatter(m, layer, momentum)) is not None]
        worst = max(errors, default=None)
        paths = [layer.path for layer in found]
        yield self.finding(
            Severity.WARNING if worst is not None and worst > _MATTERS else Severity.NOTE,
            paths,
            f"{next(iter(found)).momentum_as_set} at {layers_listed(paths)}",
            evidence=[]
            if worst is None
            else [f"the running mean scatters by up to {worst:.2g}σ (median over the channels) from step to step"],
            scatter=worst,
        )


def _scatter(m: Measurements, layer: Layer, momentum: float) -> float | None:
    scatter = layer.scatter(m.batch_size) if m.batch_sizes else None
    return None if scatter is None else median(scatter) * math.sqrt(momentum / (2 - momentum))
