from __future__ import annotations

from collections import Counter

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import listed

_LEAST, _MOST = 1e-8, 1e-2


class OddEpsilon(Rule):
    code = "BN205"
    title = "ε is unusual, or differs between layers"
    why = """
        ε is 1e-5 in torch and 1e-3 in Keras. If weights are transferred without it, every channel with a small variance
        is slightly wrong. If layers differ, one of them was often forgotten.
    """
    evidence = "Layers whose ε differs from that of most layers, or is below 1e-8 or above 1e-2."
    severity = "A note: the model does not show what its weights were trained with."
    repair = """
        for found in batchnorm.walk.norm_layers(model):
            found.module.eps = 1e-5  # the value that the weights were trained with
    """
    repair_keras = """
        model, report = batchnorm.keras.convert(model, epsilon=1e-3)  # the value that the weights were trained with
    """
    source = "The mathematics page, “Running statistics”."

    def check(self, m: Measurements) -> Findings:
        usual, _ = Counter(layer.eps for layer in m.layers).most_common(1)[0]
        odd = {layer.path: layer.eps for layer in m.layers if layer.eps != usual or not _LEAST <= layer.eps <= _MOST}
        if odd:
            values = ", ".join(f"{eps:g}" for eps in sorted(set(odd.values())))
            yield self.finding(
                Severity.NOTE, odd, f"ε = {values} at {listed(odd)}; most layers have {usual:g}", eps=odd
            )
