"""A progress bar for passes over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


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
        if self._display is not None:
            self._display.reset(self._task, description=title, total=total)
        for batch in batches:
            self._before_each()
            yield batch
            if self._display is not None:
                self._display.update(self._task, advance=1)

    def expect(self, total: int, text: str) -> None:
        """Set the total number of batches, and print a line of text."""
        if self._display is not None:
            self._display.update(self._task, total=total)
            self._display.console.print(text, highlight=False)


@contextmanager
def bar(caller: str, show: bool, before_each: Callable[[], None] = lambda: None) -> Iterator[Bar]:
    """Show a progress bar on standard error within the block, and call a function before each batch.

    Raises:
        ImportError: rich, which draws the bar, is not installed.
    """
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        yield Bar(display, before_each)
