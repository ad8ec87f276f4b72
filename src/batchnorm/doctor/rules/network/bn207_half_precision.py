from __future__ import annotations

import numpy as np

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed, named

# A warning if updates stop farther than this from the mean, in standard deviations.
_MATTERS = 0.05


class HalfPrecision(Rule):
    code = "BN207"
    title = "running statistics are kept in half precision"
    why = """
        The update running ← running + momentum·(batch - running) has no effect if the step is smaller than the last
        digit. With bfloat16 and momentum 0.1, this is the case if the two differ by less than 2%. float16 overflows at
        variances above 65504.
    """
    evidence = """
        The dtype of running statistics that are updated, and the distance from the mean at which their updates stop, in
        standard deviations: |mean|/σ · unit/momentum.
    """
    severity = "A warning if that distance is more than 0.05σ and the model is in training mode; otherwise a note."
    repair = """
        for found in batchnorm.walk.norm_layers(model):  # half-precision inputs and float32 parameters work together
            found.module.float()
    """
    source = "Micikevicius et al. 2018, *Mixed Precision Training*, section 3.1."

    def check(self, m: Measurements) -> Findings:
        found = {
            layer.path: stall for layer in m.measured if layer.updates_running and (stall := _stall(layer)) is not None
        }
        if not found:
            return
        worst = max(found, key=lambda path: found[path])
        yield self.finding(
            Severity.WARNING if found[worst] > _MATTERS and m.trains and m.training else Severity.NOTE,
            found,
            f"{layers_listed(found)}",
            evidence=[f"{named(worst)}: updates stop {found[worst]:.2g}σ away from the mean"],
            stall=found,
        )


def _stall(layer: Layer) -> float | None:
    """Return the distance from the mean at which updates stop, in σ; None unless the statistics are half precision."""
    if layer.resolution is None or layer.running is None:
        return None
    deviation = np.sqrt(np.maximum(layer.running.var + layer.eps, 1e-30))
    return float((np.abs(layer.running.mean) / deviation).max()) * layer.resolution / 2 / (layer.momentum or 0.1)
