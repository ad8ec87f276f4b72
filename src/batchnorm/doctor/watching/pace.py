"""Decide which steps to look at, so that looks take no more than their share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ratio of the total cost of a look to its duration, because a look leaves cold caches behind. Measured on a ResNet-18.
AFTERMATH = 1.3


class Pace:
    """Decide which steps to look at, from the cost of the looks so far.

    Every second of training earns a credit of `overhead` seconds. The next look happens once the credit covers the
    expected cost of a look with its aftermath; a look that costs more leaves a debt. The credit never exceeds two
    looks, so a long pause (an evaluation, a checkpoint) is not followed by a burst of looks. The first look, at the
    second step, is free: it shows the cost.

    Args:
        overhead: Share of the training time that looks may take.
        every: Look at every n-th step from the second on, whatever it costs. With None, the credit decides.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, overhead: float, every: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.overhead = overhead
        self.every = every
        self.cost: float | None = None  # of the last look, in seconds
        self.least = 1  # fewest steps from one look to the next
        self.looking = False
        self._clock = clock
        self._spent = self._credit = self._expected = 0.0
        self._since = 0
        self._last = clock()

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of the block as the cost of a look."""
        start = self._clock()
        try:
            yield
        finally:
            self._spent += self._clock() - start

    def step(self) -> bool:
        """End a step; return whether to look at the next one."""
        now, spent = self._clock(), self._spent
        trained, charged = now - self._last - spent, AFTERMATH * spent
        self._last, self._spent = now, 0.0
        if self.looking:
            if self.cost is not None:
                self._credit -= charged
            self._expected = charged if self.cost is None else (self._expected + charged) / 2
            self.cost, self._since = spent, 0
        self._since += 1
        if self.cost is None:
            self.looking = True
        elif self.every is not None:
            self.looking = self._since >= self.every
        else:
            self._credit = min(self._credit + self.overhead * trained, 2 * self._expected)
            self.looking = self._since >= self.least and self._credit >= self._expected
        return self.looking
