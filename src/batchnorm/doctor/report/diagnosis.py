"""The diagnosis, as users see it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.doctor.finding import Finding, NotChecked
from batchnorm.doctor.measure.facts import channels_of, facts_of, measures_of
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.report.conditions import Conditions
from batchnorm.doctor.report.plain import as_dict, as_text
from batchnorm.doctor.report.results import Results
from batchnorm.files import write_whole

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Diagnosis(Results):
    """The findings about a model's batch normalization. It prints as a report, in color with rich's `print`.

    Attributes:
        model: The model's class.
        findings: The findings, worst first, and each one after its causes.
        headline: The loss in evaluation and training, and what explains the gap.
        not_checked: Rules that could not be applied, with the reason.
        layers: The facts of every layer, in the model's order.
        samples: Number of samples.
        batches: Number of batches.
        measures: The measurements of each layer, in the model's order.
        conditions: The conditions of the diagnosis.
        channels: The channels of each layer, by its path; not part of the JSON.
    """

    @classmethod
    def of(cls, m: Measurements, findings: list[Finding], not_checked: list[NotChecked]) -> Diagnosis:
        """Return the diagnosis of these measurements and findings."""
        return cls(
            m.model,
            tuple(findings),
            tuple(not_checked),
            facts_of(m),
            m.samples,
            len(m.batch_sizes),
            measures_of(m),
            Conditions.of(m),
            {layer.path: channels_of(layer) for layer in m.layers},
        )

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        """Return the report in color, for rich's `print`."""
        from batchnorm.doctor.report.terminal import as_rich  # rich is optional

        return as_rich(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in the JSON, with None for numbers that are not finite."""
        return as_dict(self)

    def to_json(self) -> str:
        """Return the diagnosis as JSON; the documentation has its schema, and the field `schema` the version."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def to_html(self) -> str:
        """Return the diagnosis as one HTML page with charts, which needs no other files and no network.

        Raises:
            ImportError: jinja2 or markdown-it-py is missing.
        """
        for module, package in (("jinja2", "jinja2"), ("markdown_it", "markdown-it-py")):
            if find_spec(module) is None:
                raise ImportError(
                    f"A diagnosis as HTML expects {package} to be installed, and it is not. "
                    "Run pip install jinja2 markdown-it-py, or save it as .json or .txt."
                )
        from batchnorm.doctor.report.page import as_html  # both are optional

        return as_html(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the diagnosis to a file, completely or not at all.

        Args:
            path: Ends in `.html`, `.json`, or `.txt` for the printed report.

        Raises:
            ValueError: the path has another ending.
            ImportError: it ends in `.html`, and jinja2 or markdown-it-py is missing.
            OSError: the path is not a regular file, or it cannot be written; nothing is changed.
        """
        path = Path(path)
        texts = {".html": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        if path.suffix not in texts:
            raise ValueError(
                f"Diagnosis.save expects a path that ends in .html, .json or .txt, got {str(path)!r}. Change the name."
            )
        write_whole(path, texts[path.suffix]() + "\n")
