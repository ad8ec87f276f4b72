"""Final accuracies of a grid, laid out as tables of learning rate, batch size and norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.report.summary import Outcome


@dataclass(frozen=True)
class Square:
    """One choice in a panel.

    Attributes:
        row: Name of its row.
        column: Name of its column.
        accuracy: Mean final test accuracy of the seeds that did not diverge, 0 to 1; None if all did.
        text: The accuracy in percent, rounded as in the report's table; empty if there is none.
        diverged: How many seeds diverged.
        seeds: How many seeds ended.
        label: The choice's name in this comparison.
    """

    row: str
    column: str
    accuracy: float | None
    text: str
    diverged: int
    seeds: int
    label: str


@dataclass(frozen=True)
class Panel:
    """One table.

    Attributes:
        title: The setting that all its choices share.
        x: The setting that varies by column.
        y: The setting that varies by row.
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        squares: One for each choice with a finished run.
    """

    title: str
    x: str
    y: str
    rows: list[str]
    columns: list[str]
    squares: list[Square]


def panels(found: Sequence[Outcome], grid: Grid) -> list[Panel]:
    """Return the tables of a grid.

    If learning rate and batch size both vary, there is one table of the two for each norm; if only one varies, one
    table of it by norm; if neither does, none.
    """
    rates, sizes = len(grid.lr) > 1, len(grid.batch_size) > 1
    if rates and sizes:
        kinds = list(dict.fromkeys(_kind(outcome.choice, grid) for outcome in found))
        return [
            _panel(
                [o for o in found if _kind(o.choice, grid) == kind], kind, "learning rate", "batch size", _rate, _size
            )
            for kind in kinds
        ]
    if rates or sizes:
        x, column = ("learning rate", _rate) if rates else ("batch size", _size)
        return [_panel(found, "", x, "", column, lambda choice: _kind(choice, grid))]
    return []


def _panel(
    found: Sequence[Outcome],
    title: str,
    x: str,
    y: str,
    column: Callable[[Choice], str],
    row: Callable[[Choice], str],
) -> Panel:
    squares = []
    for outcome in found:
        final = outcome.final_accuracy.mean if outcome.final_accuracy else None
        squares.append(
            Square(
                row=row(outcome.choice),
                column=column(outcome.choice),
                accuracy=final,
                text="" if final is None else f"{100 * final:.1f}",
                diverged=len(outcome.diverged),
                seeds=len(outcome.seeds),
                label=outcome.label,
            )
        )
    rows, columns = ([*dict.fromkeys(names)] for names in ((s.row for s in squares), (s.column for s in squares)))
    return Panel(title, x, y, rows, columns, squares)


def _kind(choice: Choice, grid: Grid) -> str:
    """Return the choice's label without learning rate and batch size."""
    return replace(grid, lr=(choice.lr,), batch_size=(choice.batch_size,)).label(choice)


def _rate(choice: Choice) -> str:
    return f"{choice.lr:g}"


def _size(choice: Choice) -> str:
    return str(choice.batch_size)
