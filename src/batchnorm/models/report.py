"""The report of a function that changes a model, with a table and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from batchnorm.text import printable
from batchnorm.walk import class_of, is_batch_norm, num_channels

R = TypeVar("R", bound="Report", covariant=True)


@dataclass(frozen=True)
class Change:
    """One layer of the model, before and after.

    Attributes:
        path: The layer's path in the model, such as `layer1.0.bn2`.
        was: The layer before, such as `BatchNorm2d(64)`.
        now: The layer after; the same as `was` if it was left.
        reason: The reason, if one is needed. A layer that was left always has one.
    """

    path: str
    was: str
    now: str
    reason: str = ""

    @classmethod
    def unchanged(cls, path: str, layer: str, reason: str) -> Change:
        """Return the entry of a layer that was left."""
        return cls(path, layer, layer, reason)


@dataclass(frozen=True)
class Report:
    """The changes that a function made to a model; prints as a table.

    Attributes:
        verb: The function's name.
        changed: The layers that were changed, in the model's order.
        left: The layers that were considered but left, each with the reason.
        notes: What the change means for other objects, such as the optimizer; a sentence or two each.
    """

    verb: str
    changed: tuple[Change, ...] = ()
    left: tuple[Change, ...] = ()
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    def __str__(self) -> str:
        lines = [printable(self.summary(), lines=True)]
        if self.changed or self.left:
            header = ("layer", "was", "now", "why")
            rows = [header, *self._rows("", self.changed), *self._rows("left", self.left)]
            lines += ["", *_table(rows)]
        return "\n".join(lines)

    def summary(self) -> str:
        """Return the numbers of layers that were changed and left, and the notes, a line each."""
        return "\n".join(
            [f"{self.verb}: {len(self.changed)} changed, {len(self.left)} left", *map(printable, self.notes)]
        )

    @staticmethod
    def _rows(now: str, changes: Iterable[Change]) -> list[tuple[str, str, str, str]]:
        return [(c.path or "(model)", c.was, now or c.now, c.reason) for c in changes]


@dataclass(frozen=True)
class Result(Generic[R]):
    """The changed model and the report; unpacks as `model, report = convert(model, ...)`."""

    model: nn.Module
    report: R

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.report


def describe(layer: nn.Module, kind: type[nn.Module] | None = None) -> str:
    """Return a short description of the layer, such as `BatchNorm2d(64)`, with its own class or the class `kind`."""
    name = (kind or class_of(layer)).__name__
    sizes = [getattr(layer, name) for name in ("num_groups", "num_features", "num_channels") if hasattr(layer, name)]
    if not sizes and is_batch_norm(layer):
        sizes = [num_channels(layer)]
    return f"{name}({', '.join(map(str, sizes))})" if sizes else name


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
