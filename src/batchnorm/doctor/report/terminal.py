"""Render the results of a diagnosis, and the table of layers, with rich."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from batchnorm.doctor.finding import Finding, Severity, not_checked_lines
from batchnorm.doctor.measure.facts import LayerFacts
from batchnorm.doctor.report.plain import displayed, facts_as_text
from batchnorm.doctor.report.results import Results
from batchnorm.doctor.wording import explain_command, named

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "cyan"}


def as_rich(results: Results) -> RenderableType:
    """Return the report: the headline, and each finding with its evidence, and the fix as code."""
    results = displayed(results)
    parts: list[RenderableType] = [Text(results.summary(), style="bold")]
    parts += [Text(results.headline)] if results.headline else []
    for finding in results.findings:
        parts += _finding(finding)
    if results.not_checked:
        parts += ["", Text("not checked", style="bold")]
        parts += [Padding(Text(line), (0, 0, 0, 2)) for line in not_checked_lines(results.not_checked)]
    return Group(*parts)


def _finding(finding: Finding) -> list[RenderableType]:
    style = _STYLES[finding.severity]
    sure = "" if finding.confidence == "certain" else f"  (confidence {finding.confidence})"
    head = Text.assemble((finding.severity.label, style), " ", (finding.code, style), " ", finding.title, (sure, "dim"))
    parts: list[RenderableType] = ["", head, Padding(Text(finding.summary), (0, 0, 0, 2))]
    parts += [Padding(Text.assemble(("• ", "dim"), line), (0, 0, 0, 4)) for line in finding.evidence]
    if finding.repair:
        code = Syntax(finding.repair, "python", background_color="default", word_wrap=True)
        parts.append(Padding(code, (0, 0, 0, 4)))
    parts.append(Padding(Text(f"documentation: {explain_command(finding.code)}", style="dim"), (0, 0, 0, 4)))
    return parts


def layer_table(layers: tuple[LayerFacts, ...]) -> Table:
    """Return a table with one row per layer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows = [
        {"layer": " = ".join(map(named, (layer.path, *layer.also))), **facts}
        for layer, facts in zip(layers, facts_as_text(layers), strict=True)
    ]
    for name in rows[0]:
        text = name in ("layer", "kind", "after", "before")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    return table
