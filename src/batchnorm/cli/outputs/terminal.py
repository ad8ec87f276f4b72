"""Tables and progress bars on a terminal; both need rich."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from batchnorm.cli.errors import OneLineError

if TYPE_CHECKING:
    from rich.console import Console


def console(columns: int = 120) -> Console:
    """Return a console on standard output. If that is not a terminal, $COLUMNS or `columns` is the width."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise OneLineError(
            click.get_current_context().command_path,
            "rich, which prints the report, is not installed. Run pip install 'batchnorm[doctor]', or use --json.",
        ) from error
    width = os.environ.get("COLUMNS", "")
    return Console(highlight=False, width=None if sys.stdout.isatty() else int(width) if width.isdigit() else columns)


def print_rich(shown: Any, out: Console) -> None:
    """Print an object that rich renders, without spaces at the end of lines."""
    with out.capture() as captured:
        out.print(shown)
    print("\n".join(map(str.rstrip, captured.get().splitlines())))


def shows_progress() -> bool:
    """Return whether a progress bar can be shown: on a terminal, with rich."""
    return sys.stderr.isatty() and find_spec("rich") is not None
