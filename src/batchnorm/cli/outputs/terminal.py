"""Tables and progress bars on a terminal; both need rich."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from batchnorm.cli.errors import OneLineError

if TYPE_CHECKING:
    from rich.console import Console

_PIPED = 120  # columns without a terminal


def console(piped: int = _PIPED) -> Console:
    """Return standard output, with `piped` columns if it is not a terminal."""
    try:
        from rich.console import Console
    except ModuleNotFoundError as error:
        raise OneLineError(
            click.get_current_context().command_path,
            "rich, which prints the report, is not installed. Run pip install 'batchnorm[doctor]', or use --json.",
        ) from error
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=piped)


def shows_progress() -> bool:
    """Return whether a progress bar can be shown: on a terminal, with rich."""
    return sys.stderr.isatty() and find_spec("rich") is not None
