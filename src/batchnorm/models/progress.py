"""A progress bar for passes over data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """Shows the number of processed batches; without a display, shows nothing."""

    def __init__(self, display: Any = None) -> None:
        self._display = display
        self._task = None if display is None else display.add_task("", total=None)

    def over(self, batches: Iterable[T], title: str, total: int | None) -> Iterator[T]:
        """Yield the batches and count them."""
        if self._display is None:
            yield from batches
            return
        self._display.reset(self._task, description=title, total=total)
        for batch in batches:
            yield batch
            self._display.update(self._task, advance=1)

    def expect(self, total: int, text: str) -> None:
        """Set the total number of batches, and print a line of text."""
        if self._display is not None:
            self._display.update(self._task, total=total)
            self._display.console.print(text, highlight=False)


@contextmanager
def bar(caller: str, show: bool) -> Iterator[Bar]:
    """Show a progress bar on standard error within the block.

    Raises:
        ImportError: rich, which draws the bar, is not installed.
    """
    if not show:
        yield Bar()
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
        yield Bar(display)
