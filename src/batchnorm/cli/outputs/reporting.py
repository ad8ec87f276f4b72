"""Commands that print a report: as text, or with `--json` as one JSON object."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm.cli.outputs.streams import encodable_json
from batchnorm.cli.syntax import OneLineCommand
from batchnorm.text import json_values

if TYPE_CHECKING:
    from batchnorm.models.report import Report

# Increases by one when a field of any command is removed or changes its meaning. A new field does not change it.
SCHEMA_VERSION = 1
_STDOUT = "batchnorm.cli.outputs.reporting.stdout"


class ReportingCommand(OneLineCommand):
    """A command with the option `--json`, which gives its function the argument `as_json`.

    With `--json`, standard output holds only what `print_json` prints. Everything else that the command and the user's
    code print goes to standard error.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        option = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object instead of text.")
        self.params.append(option)

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command's function."""
        if not ctx.params["as_json"]:
            return super().invoke(ctx)
        ctx.meta[_STDOUT] = sys.stdout
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def print_json(text: str) -> None:
    """Print a JSON object on standard output."""
    out = click.get_current_context().meta[_STDOUT]
    print(encodable_json(text, out), file=out)


def print_values(verb: str, **values: Any) -> None:
    """Print a JSON object with the version of the schema, the verb, and these values."""
    print_json(json.dumps(json_values({"schema": SCHEMA_VERSION, "verb": verb, **values}), indent=2, allow_nan=False))


def print_report(report: Report, as_json: bool, output: Path | None = None) -> None:
    """Print what a function did to a model, and the file that holds the result."""
    if as_json:
        print_values(**report.to_dict(), **({} if output is None else {"output": str(output)}))
        return
    print(report)
    if output is not None:
        print(f"\nWritten: {output}")
