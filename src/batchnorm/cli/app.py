"""The command `batchnorm`."""

from __future__ import annotations

import click

from batchnorm.cli.about import completion, version_option
from batchnorm.cli.accelerate import accelerate
from batchnorm.cli.command import OneLineGroup
from batchnorm.cli.compare import compare
from batchnorm.cli.doctor import doctor
from batchnorm.cli.explain import explain
from batchnorm.cli.fold import fold
from batchnorm.cli.inspect import inspect
from batchnorm.cli.recalibrate import recalibrate
from batchnorm.cli.standardize import standardize


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
