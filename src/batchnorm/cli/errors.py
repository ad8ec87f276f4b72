"""Usage errors, printed in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from batchnorm._options import InputsNotTaken
from batchnorm.cli.exit_codes import USAGE
from batchnorm.text import printable


class OneLineError(click.ClickException):
    """A usage error, printed in one line."""

    exit_code = USAGE

    def __init__(self, command: str, message: str) -> None:
        """Take the command, such as `batchnorm compare`, and the message."""
        super().__init__(printable(" ".join(message.split())))
        self._command = command

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line on standard error."""
        print(f"{self._command}: {self.format_message()}", file=file or sys.stderr)


UsageErrorMaker = Callable[..., OneLineError]


def usage_errors_of(ctx: click.Context) -> UsageErrorMaker:
    """Return a function that makes the command's usage error from a message and, optionally, its cause."""

    def usage_error(message: str, cause: BaseException | None = None) -> OneLineError:
        return OneLineError(ctx.command_path, message if cause is None else f"{message}: {_in_one_line(cause)}")

    return usage_error


@contextmanager
def library_errors(usage_error: UsageErrorMaker, *others: type[Exception]) -> Iterator[None]:
    """Report errors of the library in one line: TypeError, ValueError and `others`."""
    kinds: tuple[type[Exception], ...] = (TypeError, ValueError, *others)
    try:
        yield
    except InputsNotTaken as error:
        raise usage_error(
            "--input must be the shape of an input that the model takes, once for each of its arguments, but calling "
            "the model failed",
            error.__cause__,
        ) from error
    except kinds as error:
        raise usage_error(str(error)) from error


@contextmanager
def running_on_data(caller: str, usage_error: UsageErrorMaker) -> Iterator[None]:
    """Report every exception in one line: errors of the library as they are, others as failures of the model."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{caller} "):
            raise usage_error(str(error)) from error
        raise usage_error("the model could not be run on the data", error) from error


def _in_one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
