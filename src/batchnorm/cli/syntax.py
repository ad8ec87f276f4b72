"""Commands that take several values per option, and report usage errors in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from click.shell_completion import CompletionItem

from batchnorm.cli.errors import OneLineError


@contextmanager
def _one_line(context: click.Context) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        path = (error.ctx or context).command_path
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        raise OneLineError(path, f"{message}{stop} See {path} --help.") from error


class SeveralValues(click.Option):
    """An option that takes every argument up to the next option, and can also be repeated.

    Args:
        commas: Whether commas within an argument also separate values.
    """

    def __init__(self, *arguments: Any, commas: bool = True, **options: Any) -> None:
        options["multiple"] = True
        super().__init__(*arguments, **options)
        self._commas = commas

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert the values, each to the option's type."""
        if self._commas and value is not None:
            parts = (part.strip() for item in value for part in str(item).split(","))
            given, value = bool(value), [part for part in parts if part]
            if given and not value:  # otherwise the default would be used
                raise click.BadParameter("it has no value. Write one, or leave the option out.", ctx, self)
        return super().type_cast_value(ctx, value)


def complete_files(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete the value as the name of a file; an argument that names a file or an object needs this."""
    return [CompletionItem(incomplete, type="file")]


class OneLineCommand(click.Command):
    """A command whose `SeveralValues` options take several values each."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("context_settings", {"show_default": True})
        super().__init__(*arguments, **options)
        # click's mark of preformatted lines, which a raw docstring writes in two characters.
        self.help = (self.help or "").replace(r"\b", "\b")

    def get_short_help_str(self, limit: int = 45) -> str:
        """Return the whole first sentence."""
        return super().get_short_help_str(limit=1000)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments after the command."""
        several = {name for option in self.params if isinstance(option, SeveralValues) for name in option.opts}
        with _one_line(ctx):
            return super().parse_args(ctx, repeat_options(args, several))


class OneLineGroup(click.Group):
    """A group of commands that reports an unknown command or option in one line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments before the command."""
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command."""
        with _one_line(ctx):
            return super().resolve_command(ctx, args)


def repeat_options(arguments: Sequence[str], several: set[str]) -> list[str]:
    """Repeat the option's name before each of its values, as click requires.

    Args:
        arguments: For example `--norms none batch --lr 0.1`.
        several: The options that take several values, such as `--norms`.

    Returns:
        For example `--norms none --norms batch --lr 0.1`.

    Raises:
        click.BadOptionUsage: another option follows such an option instead of a value.
    """
    found: list[str] = []
    current: str | None = None  # the option whose values are being read
    pending = False  # whether its first value is still to come
    for word in arguments:
        name, equals, _ = word.partition("=")
        if pending and word.startswith("--"):
            raise click.BadOptionUsage(str(current), f"Option {current!r} requires an argument.")
        if name in several:
            found.append(word)
            current, pending = name, not equals
        elif word.startswith("-") or current is None:
            found.append(word)
            current, pending = None, False
        else:
            found += [word] if pending else [current, word]
            pending = False
    return found
