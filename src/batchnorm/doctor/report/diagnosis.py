"""The diagnosis: prints, and goes to files."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.finding import Finding, NotChecked, Severity, left_out_lines
from batchnorm.doctor.measure.conditions import Conditions
from batchnorm.doctor.measure.facts import LayerFacts, facts_of
from batchnorm.doctor.measure.layers import counted
from batchnorm.doctor.measure.measures import Channels, LayerMeasures, channels_of, measures_of
from batchnorm.doctor.measure.probe import Probe
from batchnorm.files import write_whole

if TYPE_CHECKING:
    from rich.console import RenderableType

# Grows by one when a field changes its meaning or goes; fields may be added without.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with the batch normalization of a model; prints as a report, in colour by rich's `print`.

    Attributes:
        model: The model's class.
        findings: Worst first.
        not_checked: Rules that could not be applied, with the reason.
        layers: The facts of every layer, in the model's order.
        samples: How many samples were looked at.
        batches: In how many batches.
        measures: What the data showed of each layer, in the model's order.
        conditions: With what it was made.
        channels: Each layer's channels, by its path; not part of the JSON.
    """

    model: str
    findings: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    layers: tuple[LayerFacts, ...]
    samples: int
    batches: int
    measures: tuple[LayerMeasures, ...]
    conditions: Conditions
    channels: Mapping[str, Channels] = field(compare=False, repr=False)

    @classmethod
    def of(cls, probe: Probe, findings: list[Finding], not_checked: list[NotChecked]) -> Diagnosis:
        """From what was measured and what the rules made of it."""
        paths = {} if probe.trace is None else probe.trace.paths
        return cls(
            type(probe.model).__name__,
            tuple(findings),
            tuple(not_checked),
            tuple(facts_of(layer, paths) for layer in probe.layers),
            0 if probe.data is None else probe.data.samples,
            0 if probe.data is None else len(probe.data.sizes),
            measures_of(probe),
            Conditions.of(probe),
            {layer.path: channels_of(layer) for layer in probe.layers},
        )

    @property
    def worst(self) -> Severity | None:
        """The worst severity found; None where nothing was."""
        return max((finding.severity for finding in self.findings), default=None)

    @property
    def healthy(self) -> bool:
        """Whether nothing above a note was found."""
        return self.worst is None or self.worst == Severity.NOTE

    def summary(self) -> str:
        """One line: how many findings of which severity, in what."""
        number = Counter(finding.severity for finding in self.findings)
        found = [counted(number[s], s.label) for s in reversed(Severity) if number[s]]
        data = "without data"
        if self.batches:
            data = f"{counted(self.samples, 'sample')} in {counted(self.batches, 'batch')}"
        return f"{self.model}: {', '.join(found) or 'nothing found'}; {counted(len(self.layers), 'layer')}, {data}"

    def __str__(self) -> str:
        lines = [self.summary()]
        for finding in self.findings:
            sure = "" if finding.confidence == "certain" else f" [confidence {finding.confidence}]"
            lines += ["", f"{finding.severity.label} {finding.code} {finding.title}{sure}", f"    {finding.summary}"]
            lines += [f"    - {line}" for line in finding.evidence]
            lines += [f"    > {line}" for line in finding.repair.splitlines()]
        if self.not_checked:
            lines += ["", "not checked:"]
            lines += [f"    {line}" for line in left_out_lines(self.not_checked)]
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        """The same with colours, for rich's `print`."""
        from batchnorm.doctor.report.terminal import rendered

        return rendered(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON; what is not finite is None."""
        found: dict[str, Any] = _plain(
            {
                "schema": SCHEMA_VERSION,
                "model": self.model,
                "healthy": self.healthy,
                "samples": self.samples,
                "batches": self.batches,
                "findings": [{**_fields(f), "severity": f.severity.label} for f in self.findings],
                "not_checked": [_fields(rule) for rule in self.not_checked],
                "layers": [asdict(layer) for layer in self.layers],
                "measures": [asdict(layer) for layer in self.measures],
                "conditions": asdict(self.conditions),
            }
        )
        return found

    def to_json(self) -> str:
        """The diagnosis as JSON; its schema is in the documentation, its version in `schema`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """The diagnosis as a page that needs nothing else: charts, figures and repairs; opens without a network.

        Raises:
            ImportError: jinja2 is missing.
        """
        if find_spec("jinja2") is None:
            raise ImportError(
                "A diagnosis as HTML expects jinja2 to be installed, and it is not. "
                "Run pip install 'batchnorm[doctor]', or save it as .json or .txt."
            )
        from batchnorm.doctor.report.page import rendered

        return rendered(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the diagnosis to a file: whole, or not at all.

        Args:
            path: Ends in `.html`, in `.json`, or in `.txt` for what it prints as.

        Raises:
            ValueError: the path ends in something else.
            ImportError: it ends in `.html`, and jinja2 is missing.
        """
        path = Path(path)
        texts = {".html": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        if path.suffix not in texts:
            raise ValueError(
                f"Diagnosis.save expects a path that ends in .html, .json or .txt, got {str(path)!r}. Change the name."
            )
        write_whole(path, texts[path.suffix]() + "\n")


def _fields(held: Finding | NotChecked) -> dict[str, Any]:
    return {name: getattr(held, name) for name in held.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
