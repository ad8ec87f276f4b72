from __future__ import annotations

import numpy as np

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed, named

_LARGE = 1e3


class Amplified(Rule):
    code = "BN211"
    title = "channels amplify their input more than a thousand times"
    why = """
        In evaluation, a channel multiplies by γ/√(running_var + ε). If the variance is far below ε or γ has exploded,
        rounding errors, noise and any change of the data are enlarged.
    """
    evidence = "Layers whose largest |γ|/√(running_var + ε) is above 1000."
    severity = "A note: weights that work also have such channels; these are constant on their data."
    repair = "model, report = batchnorm.recalibrate(model, training_data)  # if the variances are too small"
    repair_keras = """
        model, report = batchnorm.keras.recalibrate(model, training_data)  # if the variances are too small
    """
    source = "Ioffe & Szegedy 2015, algorithm 2."

    def check(self, m: Measurements) -> Findings:
        found = {layer.path: factor for layer in m.measured if (factor := _factor(layer)) > _LARGE}
        if found:
            worst = sorted(found, key=lambda path: -found[path])
            yield self.finding(
                Severity.NOTE,
                worst,
                f"{named(worst[0])} by up to {found[worst[0]]:.3g}; {layers_listed(worst)}",
                factor=found,
            )


def _factor(layer: Layer) -> float:
    weight = layer.vectors.weight
    if layer.running is None or not bool((layer.running.var + layer.eps > 0).all()):
        return 0.0
    scale = 1 / np.sqrt(layer.running.var + layer.eps)
    return float((scale if weight is None else scale * np.abs(weight)).max())
