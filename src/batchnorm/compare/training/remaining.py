"""The time that a comparison still needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)
TRUSTED = 2.0  # weight of a trial against the measured times of the runs, in seconds of training


@dataclass(frozen=True)
class Costs:
    """The time that a run of one kind takes, as measured in a short trial.

    Attributes:
        start: Seconds before the first step.
        step: Seconds of a step.
        evaluation: Seconds of an evaluation; there is one before the first step.
    """

    start: float
    step: float
    evaluation: float

    def until(self, step: int, interval: int) -> float:
        """Return the seconds until the end of a step, with an evaluation every `interval` steps."""
        return self.start + step * self.step + (1 + step // interval) * self.evaluation


@dataclass(frozen=True)
class Planned(Generic[Kind]):
    """One run of the plan.

    Attributes:
        kind: Runs of the same kind take the same time per step.
        steps: Number of steps.
        interval: Steps from one evaluation to the next.
    """

    kind: Kind
    steps: int
    interval: int


class Remaining(Generic[Kind]):
    """Estimate the remaining time of a plan. The announced time (`text`) never rises.

    Each kind of run has its own costs, because one may take a hundred times as long as another. They come from a trial
    of every kind; as soon as runs of a kind have trained, their true time corrects them. If the plan turns out to take
    longer than announced, the announcement stays, as a lower bound, until the rest takes less than that.

    Args:
        plan: The runs, in their order.
        costs: The costs of each kind.
        clock: Returns seconds.
    """

    def __init__(
        self, plan: Sequence[Planned[Kind]], costs: Mapping[Kind, Costs], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._costs, self._clock = plan, costs, clock
        self._number = -1  # of the current run
        self._step = 0  # in it
        self._begun = 0.0
        self._spent = dict.fromkeys(costs, 0.0)  # in finished runs of each kind
        self._expected = dict.fromkeys(costs, 0.0)  # for the same runs, by the trial
        self._announced: float | None = None

    def begin(self) -> None:
        """Note that the next run begins."""
        self._number, self._step, self._begun = self._number + 1, 0, self._clock()

    def step(self, step: int) -> None:
        """Note the number of steps that the current run has taken."""
        self._step = step

    def end(self) -> None:
        """Note that the current run has ended, perhaps early."""
        run = self._plan[self._number]
        self._spent[run.kind] += self._clock() - self._begun
        self._expected[run.kind] += self._costs[run.kind].until(self._step, run.interval)
        self._step = run.steps

    @property
    def estimate(self) -> float:
        """The seconds that the rest should take."""
        current = self._plan[self._number]
        whole = self._costs[current.kind].until(current.steps, current.interval)
        left = dict.fromkeys(self._costs, 0.0)
        left[current.kind] += whole - self._costs[current.kind].until(self._step, current.interval)
        for run in self._plan[self._number + 1 :]:
            left[run.kind] += self._costs[run.kind].until(run.steps, run.interval)
        return sum(seconds * self._correction(kind) for kind, seconds in left.items())

    @property
    def text(self) -> str:
        """The remaining time, as a phrase."""
        estimate = self.estimate
        announced = estimate if self._announced is None else min(self._announced, estimate)
        self._announced = announced
        return f"{'more than ' if round(estimate) > round(announced) else ''}{_duration(announced)} left"

    def _correction(self, kind: Kind) -> float:
        """Return the true time of a kind's steps divided by the time that its costs predict.

        At first it stays near 1, so that a few quick steps do not announce too little.
        """
        spent, expected = self._spent[kind], self._expected[kind]
        current = self._plan[self._number]
        if current.kind == kind and 0 < self._step < current.steps:
            spent += self._clock() - self._begun
            expected += self._costs[kind].until(self._step, current.interval)
        return (spent + TRUSTED) / (expected + TRUSTED)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
