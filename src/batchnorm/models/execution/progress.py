"""A progress bar for passes over data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Timer
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 3.0  # seconds without a bar, for functions that are usually faster


class Bar:
    """Shows the number of processed batches; without a display, shows nothing.

    Args:
        display: Draws the bar.
        before_each: Called before each batch.
    """

    def __init__(self, display: Any = None, before_each: Callable[[], None] = lambda: None) -> None:
        self._display = display
        self._before_each = before_each
        self._task = None if display is None else display.add_task("", total=None)

    def over(self, batches: Iterable[T], title: str, total: int | None) -> Iterator[T]:
        """Yield the batches and count them."""
        self._begin(title, total)
        for batch in batches:
            self._before_each()
            yield batch
            if self._display is not None:
                self._display.update(self._task, advance=1)

    def during(self, title: str) -> None:
        """Show a step of unknown length."""
        self._begin(title, None)

    def expect(self, total: int, text: str) -> None:
        """Set the total number of batches, and print a line of text."""
        if self._display is not None:
            self._display.update(self._task, total=total)
            self._display.console.print(text, highlight=False)

    def _begin(self, title: str, total: int | None) -> None:
        if self._display is not None:  # a new task, because rich keeps the former total if the new one is None
            self._display.remove_task(self._task)
            self._task = self._display.add_task(title, total=total)


@contextmanager
def bar(
    caller: str, show: bool | None, before_each: Callable[[], None] = lambda: None, *, after: float = 0.0
) -> Iterator[Bar]:
    """Show a progress bar on standard error within the block, and call a function before each batch.

    Args:
        caller: The function that the user called, for the error message.
        show: Whether to show the bar; None: if standard error is a terminal, and rich is installed.
        before_each: Called before each batch.
        after: The seconds before the bar appears.

    Raises:
        ImportError: show is true, and rich, which draws the bar, is not installed.
    """
    if show is None:
        show = sys.stderr is not None and sys.stderr.isatty() and find_spec("rich") is not None
    if not show:
        yield Bar(before_each=before_each)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            f"{caller} with progress=True expects rich to be installed, and it is not. "
            "Run pip install rich, or leave progress=False."
        ) from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=True)
    timer = Timer(after, display.start)
    timer.daemon = True
    try:
        timer.start() if after else display.start()
        yield Bar(display, before_each)
    finally:
        if after:
            timer.cancel()
            timer.join()
        if display.live.is_started:
            display.stop()
