"""BN103: the data are not those whose statistics the layers hold."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.bn102_stale_statistics import off_finding
from batchnorm.doctor.rules.rule import Rule


class DomainShift(Rule):
    """The weights and the running statistics belong together; the data do not belong to them."""

    code = "BN103"
    title = "the data are not those that the running statistics were made from"
    why = (
        "Evaluation normalizes by the statistics of the training data. Data of another kind, or prepared in another "
        "way (0 to 255 instead of 0 to 1, another mean, another order of colours), come out shifted and scaled."
    )
    repair = (
        "# first compare how training and evaluation prepare the data; if they are meant to differ:\n"
        "model, report = batchnorm.recalibrate(model, data)  # of the new kind; of few samples, with prior=16"
    )
    needs = ("data", "output")

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Where the running statistics are off as a change of the data explains."""
        yield from off_finding(self, probe, ("shift",))
