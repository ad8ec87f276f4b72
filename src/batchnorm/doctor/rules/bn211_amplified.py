"""BN211: channels that multiply what comes in by a large factor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

_LARGE = 1e3


class Amplified(Rule):
    """A note: weights that work have such channels too."""

    code = "BN211"
    title = "channels amplify their input a thousand times"
    why = (
        "In evaluation a channel multiplies by γ/√(running_var + ε). Where the variance is far below ε or γ has "
        "exploded, rounding, noise and any change of the data come out enlarged."
    )
    repair = "model, report = batchnorm.recalibrate(model, training_data)  # if the variances are too small"

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the factor in evaluation."""
        found = {layer.path: factor for layer in probe.measured if (factor := _factor(layer)) > _LARGE}
        if found:
            worst = sorted(found, key=lambda path: -found[path])
            yield self.finding(
                Severity.NOTE,
                worst,
                f"{worst[0] or '(model)'} by up to {found[worst[0]]:.3g}; {counted(len(found), 'layer')}: "
                f"{listed(worst)}",
                factor=found,
            )


def _factor(layer: Layer) -> float:
    weight = getattr(layer.module, "weight", None)
    if layer.before is None or not bool((layer.before.var + layer.eps > 0).all()):
        return 0.0
    scale = (layer.before.var + layer.eps).rsqrt()
    if isinstance(weight, Tensor):
        scale = scale * weight.detach().double().cpu().abs()
    return float(scale.max())
