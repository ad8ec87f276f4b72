"""What a verb did to a model, as a table and as attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

R = TypeVar("R", bound="Report", covariant=True)


@dataclass(frozen=True)
class Change:
    """One layer of the model: what it was, what became of it, and why.

    Attributes:
        path: Where it is in the model, such as `layer1.0.bn2`.
        was: What it was, such as `BatchNorm2d(64)`.
        now: What it is afterwards; what it was, where it was left.
        reason: Why, where that needs saying; always for what was left.
    """

    path: str
    was: str
    now: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What a verb did; prints as a table.

    Attributes:
        verb: The function's name.
        changed: What was changed, in the model's order.
        left: What was looked at and left alone, each with the reason.
    """

    verb: str
    changed: tuple[Change, ...] = ()
    left: tuple[Change, ...] = ()

    def __str__(self) -> str:
        lines = [self.summary()]
        if self.changed or self.left:
            header = ("layer", "was", "now", "why")
            rows = [header, *self._rows("", self.changed), *self._rows("left", self.left)]
            lines += ["", *_table(rows)]
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: how many layers were changed and how many left."""
        return f"{self.verb}: {len(self.changed)} changed, {len(self.left)} left"

    @staticmethod
    def _rows(now: str, changes: Iterable[Change]) -> list[tuple[str, str, str, str]]:
        return [(c.path or "(model)", c.was, now or c.now, c.reason) for c in changes]


@dataclass(frozen=True)
class Result(Generic[R]):
    """The model after a verb, and what the verb did; unpacks as `model, report = verb(model)`."""

    model: nn.Module
    report: R

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.report


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
