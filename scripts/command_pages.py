"""A hook of mkdocs that shows the help of every command where a page has `<!-- commands -->`."""

from __future__ import annotations

from typing import Any

import click

from batchnorm.cli.app import app

WIDTH = 80  # columns of a block of code in a window of 1280 pixels


def reference() -> str:
    """Return a section for each command, with what `--help` prints."""
    program = click.Context(app, info_name="batchnorm", terminal_width=WIDTH, **app.context_settings)
    parts = [f"```text\n{app.get_help(program)}\n```"]
    for name in app.list_commands(program):
        command = app.commands[name]
        context = click.Context(
            command, info_name=name, parent=program, terminal_width=WIDTH, **command.context_settings
        )
        parts += [f"## batchnorm {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands into the page."""
    return markdown.replace("<!-- commands -->", reference()) if "<!-- commands -->" in markdown else markdown
