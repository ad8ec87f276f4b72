"""The command `explain`."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib.util import find_spec

import click

from batchnorm.cli.errors import OneLineError
from batchnorm.cli.syntax import OneLineCommand
from batchnorm.rule_texts import RuleText, rule_texts


@click.command(cls=OneLineCommand)
@click.argument("codes", metavar="[CODE]...", nargs=-1)
@click.pass_context
def explain(ctx: click.Context, /, codes: tuple[str, ...]) -> None:
    r"""Print the documentation of the doctor's codes; without a code, list them all.

    \b
    Examples:
      batchnorm explain
      batchnorm explain BN107
    """
    texts = rule_texts()
    chosen = [_found(ctx, code, texts) for code in codes]
    if not chosen:
        for text in texts.values():
            click.echo(f"{text.code}  {text.title}")
    for text in chosen:
        _print(text.markdown())


def _found(ctx: click.Context, code: str, texts: dict[str, RuleText]) -> RuleText:
    if (text := texts.get(code.upper())) is not None:
        return text
    near = get_close_matches(code.upper(), texts, cutoff=0.5)
    instead = f"Did you mean {' or '.join(near)}?" if near else f"Run {ctx.command_path} to list the codes."
    raise OneLineError(ctx.command_path, f"codes are {min(texts)} to {max(texts)}, got {code}. {instead}")


def _print(markdown: str) -> None:
    """Print Markdown, rendered in a terminal if rich is installed."""
    if sys.stdout.isatty() and find_spec("rich") is not None:
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(markdown))
    else:
        click.echo(markdown)
