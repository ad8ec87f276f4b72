"""Tries, until the time is over, and their failures."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Tally:
    """The tries of one attack; every try has its own random generator, so that it can be repeated alone.

    Attributes:
        seconds: Time after which no try begins.
        seed: Seed of all tries.
        only: The number of the only try; None for all.
        at_least: Number of tries that run even if the time is over.
        tried: Number of finished tries.
        failures: Number and description of each failed try.
        figures: Counts to report, by name.
    """

    seconds: float
    seed: int = 0
    only: int | None = None
    at_least: int = 1
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)

    def tries(self) -> Iterator[tuple[int, np.random.Generator]]:
        """Yield number and generator of each try."""
        end = time.monotonic() + self.seconds
        number = 0 if self.only is None else self.only
        while True:
            yield number, np.random.default_rng([self.seed, number])
            number += 1
            if self.only is not None or (time.monotonic() > end and self.tried >= self.at_least):
                return

    @contextmanager
    def expecting(self, number: int, description: object) -> Iterator[None]:
        """Count a try, and an exception in it as a failure."""
        try:
            yield
        except Exception as error:
            self.fail(number, f"{description}: {traceback.format_exception_only(error)[-1].strip()}")
        self.tried += 1

    def fail(self, number: int, what: str) -> None:
        """Record a failure."""
        self.failures.append(f"try {number}: {what}")

    def count(self, name: str, more: int = 1) -> None:
        """Add to a figure."""
        self.figures[name] = self.figures.get(name, 0) + more
