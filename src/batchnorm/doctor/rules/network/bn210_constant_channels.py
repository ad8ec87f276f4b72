from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, layers_listed


class ConstantChannels(Rule):
    code = "BN210"
    title = "channels are constant in the data"
    why = """
        If the variance is 0, x - mean is divided by √ε alone. With ε = 1e-5, the first deviation in evaluation is
        enlarged 316 times.
    """
    evidence = "Channels of each layer's input whose variance is exactly 0 over all the data."
    severity = "A note: on these data they do no harm."
    repair = "# look for a filter whose weights are 0, an empty column, or an activation that is never on"
    repair_keras = """
        # look for a filter whose weights are 0, an empty column, or an activation that is never on
    """
    source = "Ioffe & Szegedy 2015, algorithm 1 (ε)."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        populations = {layer.path: layer.population for layer in m.measured}
        found = {
            path: number
            for path, population in populations.items()
            if population is not None and (number := int((population.m2 == 0).sum()))
        }
        if found:
            worst = sorted(found, key=lambda path: -found[path])
            yield self.finding(
                Severity.NOTE,
                worst,
                f"{counted(sum(found.values()), 'channel')} of {layers_listed(worst)}",
                channels=found,
            )
