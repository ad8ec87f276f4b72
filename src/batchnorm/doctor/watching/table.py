"""Print the last look as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.watching.records import Record
from batchnorm.doctor.wording import counted, listed, named

_SHOWN = 12


def table(history: Sequence[Sequence[Record]], findings: Sequence[Finding], steps: int) -> str:
    """Return a line for each of the twelve layers with the largest distances, and the findings."""
    looks = f"{counted(steps, 'step')}, {counted(len(history), 'look')}"
    lines = [f"watch: {looks}; {counted(len(findings), 'finding')}"]
    if history:
        records = sorted(history[-1], key=lambda record: -_known(record.mean_distance))
        rows: list[tuple[str, ...]] = [("layer", "mean distance", "ln var ratio", "noise", "dead", "updates")]
        rows += [_row(record) for record in records[:_SHOWN]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        if len(records) > _SHOWN:
            lines.append(f"and {counted(len(records) - _SHOWN, 'layer')} with smaller distances")
    lines += [""] * bool(findings)
    lines += [f"{f.severity.label} {f.code} {f.title}: {listed(f.paths)}" for f in findings]
    return "\n".join(lines)


def _row(record: Record) -> tuple[str, ...]:
    figures = [
        "" if math.isnan(value) else form.format(value)
        for value, form in (
            (record.mean_distance, "{:.2g}σ"),
            (record.log_ratio, "{:+.2f}"),
            (record.noise, "{:.2g}σ"),
            (record.dead, "{:.0%}"),
        )
    ]
    return (named(record.layer), *figures, "" if record.updates is None else str(record.updates))


def _known(value: float) -> float:
    return -1.0 if math.isnan(value) else value
