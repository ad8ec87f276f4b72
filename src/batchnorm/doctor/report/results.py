"""The results of a diagnosis, as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from batchnorm.doctor.finding import Finding, NotChecked, Severity
from batchnorm.doctor.measure.facts import Channels, LayerFacts, LayerMeasures
from batchnorm.doctor.report.conditions import Conditions
from batchnorm.doctor.wording import counted


@dataclass(frozen=True)
class Results:
    """The data of a diagnosis, which every report is rendered from. `Diagnosis` documents the attributes."""

    model: str
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    layers: tuple[LayerFacts, ...]
    samples: int
    batches: int
    measures: tuple[LayerMeasures, ...]
    conditions: Conditions
    channels: Mapping[str, Channels] = field(compare=False, repr=False)

    @property
    def worst(self) -> Severity | None:
        """The worst severity of the findings; None without findings."""
        return max((finding.severity for finding in self.findings), default=None)

    @property
    def healthy(self) -> bool:
        """Whether no finding is above a note."""
        return self.worst is None or self.worst == Severity.NOTE

    @property
    def headline(self) -> str:
        """The loss in evaluation and training, and what explains the gap; empty if it is no more than a note."""
        gap = next((finding for finding in self.findings if finding.code == "BN101"), None)
        if gap is None or gap.severity == Severity.NOTE:
            return ""
        causes = [finding.summary for finding in self.findings if gap.causes == (finding.code,)]
        return f"{gap.summary} ({causes[0]})" if causes else gap.summary

    def summary(self) -> str:
        """Return one line: the number of findings of each severity, and what was examined."""
        number = Counter(finding.severity for finding in self.findings)
        found = [counted(number[s], s.label) for s in reversed(Severity) if number[s]]
        data = "without data"
        if self.batches:
            data = f"{counted(self.samples, 'sample')} in {counted(self.batches, 'batch')}"
            if self.conditions.loss_source:
                data += f", {'loss' if self.conditions.loss else 'no loss:'} {self.conditions.loss_source}"
        return f"{self.model}: {', '.join(found) or 'nothing found'}; {counted(len(self.layers), 'layer')}, {data}"
