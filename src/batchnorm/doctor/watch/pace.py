"""How often a step is looked at, so that looking takes no more than its share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What a look costs in all, over the time that it takes itself: the caches are colder after it. Measured on a ResNet-18.
AFTERMATH = 1.3


class Pace:
    """Decides from what looking has cost so far.

    Every second of training earns `overhead` seconds for looking; a step is looked at once they pay for what the last
    looks cost, their aftermath included, and what one costs beyond that is owed. No more than two looks are saved up,
    so that a long pause (an evaluation, a checkpoint) buys no burst. The first look, at the second step, is on the
    house: it shows the cost.

    Args:
        overhead: Share of the training time that looking may take.
        every: Look at each so manieth step from the second on, whatever it costs; None goes by the time.
        clock: Seconds.
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
        """What is done within is the cost of looking."""
        start = self._clock()
        try:
            yield
        finally:
            self._spent += self._clock() - start

    def step(self) -> bool:
        """A step is over; returns whether to look at the next one."""
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
