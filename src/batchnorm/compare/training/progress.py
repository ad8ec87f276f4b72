"""Progress of a comparison: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from batchnorm.compare.training.remaining import Remaining

REFRESH_SECONDS = 0.1
LINE_SECONDS = 10.0


class Display:
    """Show the progress of a comparison, as a context manager around it. This base class only counts.

    Args:
        runs: Number of runs.
        steps: Number of steps in all runs.
        remaining: Estimates the remaining time.
    """

    def __init__(self, runs: int, steps: int, remaining: Remaining[Any]) -> None:
        self._runs, self._steps = runs, steps
        self._remaining = remaining
        self._run = 0  # number of the current run
        self._before = self._in_run = 0  # steps in the runs before it, and in it
        self._title = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, title: str, steps: int) -> None:
        """Begin a run of `steps` steps."""
        self._run += 1
        self._before, self._in_run = self._before + self._in_run, steps
        self._title = title
        self._remaining.begin()
        self._show_run()

    def step(self, step: int, loss: float) -> None:
        """Show that the current run has taken a step."""
        self._remaining.step(step)
        self._show_step(step, loss)

    def end(self, outcome: str) -> None:
        """End the current run."""
        self._remaining.end()
        self._show_end(outcome)

    def _show_run(self) -> None:
        pass

    def _show_step(self, step: int, loss: float) -> None:
        pass

    def _show_end(self, outcome: str) -> None:
        pass


class Bar(Display):
    """A bar over all steps of all runs, with the loss and the time left.

    It draws only between steps, and never in its own thread, so drawing is not part of the measured time.
    """

    def __init__(self, console: Console, runs: int, steps: int, remaining: Remaining[Any]) -> None:
        super().__init__(runs, steps, remaining)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[left]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=steps, loss="  -  ", left="")
        self._drawn = 0.0

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def _show_step(self, step: int, loss: float) -> None:
        """Move the bar, unless it has just moved."""
        if time.monotonic() - self._drawn < REFRESH_SECONDS:
            return
        self._drawn = time.monotonic()
        self._progress.update(
            self._task, completed=self._before + step, loss=f"{loss:.3f}", left=self._remaining.text, refresh=True
        )

    def _show_end(self, outcome: str) -> None:
        """Print the outcome above the bar."""
        self._progress.console.print(f"{self._title}: {outcome}", highlight=False, markup=False)
        self._progress.update(self._task, completed=self._before + self._in_run, refresh=True)

    def _show_run(self) -> None:
        self._progress.update(self._task, description=f"{self._title} ({self._run} of {self._runs})", refresh=True)


class Lines(Display):
    """A line for each run, and one every ten seconds within a run."""

    def __init__(self, console: Console, runs: int, steps: int, remaining: Remaining[Any]) -> None:
        super().__init__(runs, steps, remaining)
        self._console = console
        self._printed = time.monotonic()

    def _show_step(self, step: int, loss: float) -> None:
        """Print a line, unless one was printed less than ten seconds ago."""
        now = time.monotonic()
        if now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        self._print(f"step {step} of {self._in_run}, loss {loss:.3f}, {self._remaining.text}")

    def _show_end(self, outcome: str) -> None:
        """Print the outcome."""
        self._print(outcome)

    def _show_run(self) -> None:
        self._printed = time.monotonic()

    def _print(self, text: str) -> None:
        line = f"[{self._run}/{self._runs}] {self._title}: {text}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def display(show: bool, runs: int, steps: int, remaining: Remaining[Any]) -> Display:
    """Return a bar if standard error is a terminal, lines if it is not, or nothing.

    Args:
        show: Whether to show anything.
        runs: Number of runs.
        steps: Number of steps in all runs.
        remaining: Estimates the remaining time.
    """
    if not show:
        return Display(runs, steps, remaining)
    console = Console(stderr=True)
    kind = Bar if console.is_terminal else Lines
    return kind(console, runs, steps, remaining)
