from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, named


class RedundantBias(Rule):
    code = "BN110"
    title = "a bias before batch normalization does nothing"
    why = """
        The bias shifts the mean of the batch, which is subtracted. It costs parameters and optimizer state, and the
        running mean follows it.
    """
    evidence = """
        In the traced model: convolutions, and linear layers of `[N, C]`, with a bias whose result is read by batch
        normalization alone. Layers that do not normalize by the batch in training, and layers with their own
        `forward`, are left out. Without data the model is traced on random input of a common size.
    """
    severity = "Always a note: it does no harm."
    repair = "model, report = batchnorm.drop_redundant_bias(model)  # in training: optimizer=optimizer, inplace=True"
    source = "Ioffe & Szegedy 2015, section 3.2."
    needs = ("trace",)

    def check(self, m: Measurements) -> Findings:
        places = {layer.path: layer.place for layer in m.layers if layer.place is not None}
        found = {path: place.useless_bias for path, place in places.items() if place.useless_bias is not None}
        if not found:
            return
        number = sum(bias.size for bias in found.values())
        producers = [bias.path for bias in found.values()]
        yield self.finding(
            Severity.NOTE,
            producers,
            f"{counted(number, 'parameter does', 'parameters do')} nothing, in the bias of {listed(producers)}",
            evidence=[f"{bias.path} before {named(path)}" for path, bias in list(found.items())[:5]],
            cost={"parameters": float(number)},
        )
