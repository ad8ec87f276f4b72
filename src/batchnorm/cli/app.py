"""The command `batchnorm`."""

from __future__ import annotations

import click

from batchnorm.cli.commands.about import completion, version_option
from batchnorm.cli.commands.accelerate import accelerate
from batchnorm.cli.commands.compare import compare
from batchnorm.cli.commands.doctor import doctor
from batchnorm.cli.commands.explain import explain
from batchnorm.cli.commands.fold import fold
from batchnorm.cli.commands.inspect import inspect
from batchnorm.cli.commands.recalibrate import recalibrate
from batchnorm.cli.commands.standardize import standardize
from batchnorm.cli.syntax import OneLineGroup


@version_option
@click.group(
    cls=OneLineGroup,
    invoke_without_command=True,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Batch normalization: compare, diagnose, fold, accelerate and recalibrate networks that use it."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for command in (compare, doctor, explain, inspect, fold, accelerate, recalibrate, standardize, completion):
    app.add_command(command)
