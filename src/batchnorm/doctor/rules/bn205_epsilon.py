"""BN205: an ε that is odd, or not the same everywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

_LEAST, _MOST = 1e-8, 1e-2


class OddEpsilon(Rule):
    """A note: it matters where it is not what the weights were trained with, which the model does not say."""

    code = "BN205"
    title = "ε is unusual, or differs between layers"
    why = (
        "ε is 1e-5 in torch and 1e-3 in Keras. Weights brought over without it are a little off in every channel of "
        "small variance; where layers differ, one of them was often forgotten."
    )
    repair = (
        "for found in batchnorm.walk.norm_layers(model):\n"
        "    found.module.eps = 1e-5  # what the weights were trained with"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Those outside the usual range, and those unlike most."""
        usual, _ = Counter(layer.eps for layer in probe.layers).most_common(1)[0]
        odd = [layer for layer in probe.layers if layer.eps != usual or not _LEAST <= layer.eps <= _MOST]
        if odd:
            values = ", ".join(f"{eps:g}" for eps in sorted({layer.eps for layer in odd}))
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in odd],
                f"ε = {values} at {listed(layer.path for layer in odd)}; most layers have {usual:g}",
                eps={layer.path: layer.eps for layer in odd},
            )
