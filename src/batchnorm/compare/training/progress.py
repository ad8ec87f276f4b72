"""What is seen while a comparison runs: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0


class Display(Protocol):
    """Shows how far a comparison is; used as a context manager around it."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None: ...

    def begin(self, title: str, steps: int) -> None:
        """A run of so many steps begins."""

    def step(self, step: int, loss: float) -> None:
        """A step of the current run was taken."""

    def end(self, outcome: str) -> None:
        """The current run has ended."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, title: str, steps: int) -> None:
        """A run of so many steps begins."""

    def step(self, step: int, loss: float) -> None:
        """A step of the current run was taken."""

    def end(self, outcome: str) -> None:
        """The current run has ended."""


class Bar:
    """A bar over all steps of all runs, with the loss and the time left.

    It draws only between steps, never from a thread of its own, so that it is not in the measured time.
    """

    def __init__(self, console: Console, runs: int, steps: int) -> None:
        """Takes where to draw, and the number of runs and of their steps in all."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=steps, loss="  -  ")
        self._runs, self._run = runs, 0
        self._begun = self._end = 0  # of the current run, in steps
        self._drawn = 0.0
        self._title = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, title: str, steps: int) -> None:
        """A run of so many steps begins."""
        self._run += 1
        self._begun, self._end = self._end, self._end + steps
        self._title = title
        self._progress.update(self._task, description=f"{title} ({self._run} of {self._runs})", refresh=True)

    def step(self, step: int, loss: float) -> None:
        """A step of the current run was taken."""
        if time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = time.monotonic()
        completed = self._begun + step
        self._progress.update(self._task, completed=completed, loss=f"{loss:.3f}", refresh=True)

    def end(self, outcome: str) -> None:
        """The current run has ended."""
        self._progress.console.print(f"{self._title}: {outcome}", highlight=False, markup=False)
        self._progress.update(self._task, completed=self._end, refresh=True)


class Lines:
    """A line for each run, and one now and then in a long run."""

    def __init__(self, console: Console, runs: int, steps: int) -> None:
        """Takes where to write, and the number of runs and of their steps in all."""
        self._console = console
        self._runs, self._steps, self._run = runs, steps, 0
        self._before = self._of_run = 0  # steps
        self._title = ""
        self._begun = self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, title: str, steps: int) -> None:
        """A run of so many steps begins."""
        self._run += 1
        self._before, self._of_run = self._before + self._of_run, steps
        self._title = f"[{self._run}/{self._runs}] {title}"
        self._said = time.monotonic()

    def step(self, step: int, loss: float) -> None:
        """A step of the current run was taken."""
        now = time.monotonic()
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        done = self._before + step
        left = (now - self._begun) / done * (self._steps - done)
        self._say(f"{self._title}: step {step} of {self._of_run}, loss {loss:.3f}, {left:.0f} s left")

    def end(self, outcome: str) -> None:
        """The current run has ended."""
        self._say(f"{self._title}: {outcome}")

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def display(show: bool, runs: int, steps: int) -> Display:
    """Returns a bar where standard error is a terminal, lines where it is not, or nothing.

    Args:
        show: Whether anything is shown.
        runs: Number of runs.
        steps: Number of their steps in all.
    """
    if not show:
        return Silent()
    console = Console(stderr=True)
    return Bar(console, runs, steps) if console.is_terminal else Lines(console, runs, steps)
