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
from batchnorm.doctor.report.results import Results
from batchnorm.doctor.wording import named

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "cyan"}


def as_rich(results: Results) -> RenderableType:
    """Return the report: findings worst first, each with its evidence, and the fix as code."""
    parts: list[RenderableType] = [Text(results.summary(), style="bold")]
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
    return parts


def layer_table(layers: tuple[LayerFacts, ...]) -> Table:
    """Return a table with one row per layer."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layer", "kind", "after", "before"):
        table.add_column(name, overflow="fold")
    for name in ("mode", "momentum", "ε", "updates", "γ", "β", "mean", "variance", "dead", "foldable", "values"):
        table.add_column(name, justify="right", overflow="fold")
    for layer in layers:
        table.add_row(*map(Text, _row(layer)))
    return table


def _row(layer: LayerFacts) -> tuple[str, ...]:
    return (
        " = ".join((named(layer.path), *layer.also)),
        f"{layer.kind}({layer.channels})",
        layer.after or "?",
        layer.before or "?",
        "train" if layer.training else "eval",
        "average" if layer.momentum is None else f"{layer.momentum:g}",
        f"{layer.eps:g}",
        "–" if layer.updates is None else str(layer.updates),
        *(_span(pair) for pair in (layer.weight, layer.bias, layer.running_mean, layer.running_var)),
        "–" if layer.dead is None else f"{layer.dead:.0%}",
        "?" if layer.foldable is None else "yes" if layer.foldable else "no",
        f"{layer.parameters}+{layer.buffers}",
    )


def _span(pair: tuple[float, float] | None) -> str:
    return "–" if pair is None else f"{pair[0]:.3g} … {pair[1]:.3g}".replace("-", "−")
