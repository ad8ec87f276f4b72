"""BN210: channels that are the same everywhere in the data."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class ConstantChannels(Rule):
    """A note: on these data they do no harm."""

    code = "BN210"
    title = "channels are constant in the data"
    why = (
        "Where the variance is 0, x - mean is divided by √ε alone: with ε = 1e-5 the first value that differs in "
        "evaluation comes out 316 times as large as its difference."
    )
    repair = "# look for a filter whose weights are 0, a column that is empty, or an activation that is never on"
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Channels of variance 0 over all the data."""
        found: dict[str, int] = {}
        for layer in probe.measured:
            population = layer.population
            if population is not None and (number := int((population.m2 == 0).sum())):
                found[layer.path] = number
        if found:
            worst = sorted(found, key=lambda path: -found[path])
            yield self.finding(
                Severity.NOTE, worst,
                f"{counted(sum(found.values()), 'channel')} of {counted(len(found), 'layer')}: {listed(worst)}",
                channels=found,
            )  # fmt: skip
