"""A bar while data go through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Bar:
    """Shows how many batches were seen; without a display, shows nothing."""

    def __init__(self, display: Any = None) -> None:
        self._display = display
        self._task = None if display is None else display.add_task("", total=None)

    def over(self, batches: Iterable[T], title: str, total: int | None) -> Iterator[T]:
        """The batches, counted."""
        if self._display is None:
            yield from batches
            return
        self._display.reset(self._task, description=title, total=total)
        for batch in batches:
            yield batch
            self._display.update(self._task, advance=1)

    def expect(self, total: int, text: str) -> None:
        """Tell how many batches there will be, and a line about that."""
        if self._display is not None:
            self._display.update(self._task, total=total)
            self._display.console.print(text, highlight=False)


@contextmanager
def bar(show: bool) -> Iterator[Bar]:
    """A bar on standard error while the block runs.

    Raises:
        ImportError: rich, which draws it, is not installed.
    """
    if not show:
        yield Bar()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            "recalibrate with progress=True expects rich to be installed, and it is not. "
            "Run pip install 'batchnorm[compare]', or leave progress=False."
        ) from error
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        yield Bar(display)
