"""The command `inspect`."""

from __future__ import annotations

import click

from batchnorm.cli.errors import library_errors, usage_errors_of
from batchnorm.cli.inputs.loading import Weights, network, random_inputs, shape_of, weights_options
from batchnorm.cli.outputs.reporting import ReportingCommand, print_values
from batchnorm.cli.outputs.terminal import console, print_rich

_WIDEST = 240  # columns without a terminal, so that each layer has one line


@click.command(cls=ReportingCommand)
@click.argument("model", metavar="MODULE.PATH:CALLABLE")
@weights_options
@click.option(
    "--input",
    "size",
    metavar="N,C,H,W",
    help="Shape of the input, such as 1,3,224,224, to find the place of each layer. By default common shapes.",
)
@click.pass_context
def inspect(ctx: click.Context, /, model: str, weights: Weights | None, size: str | None, as_json: bool) -> None:
    r"""Print every layer of batch normalization: its place, settings, and ranges of parameters and statistics.

    The table fits the terminal. In a pipe or a file, each layer has one line; $COLUMNS sets another width.

    \b
    Examples:
      batchnorm inspect net:build --weights net.pth --input 1,3,224,224
    """
    from batchnorm.doctor.pytorch.inspection import inspect_layers

    usage_error = usage_errors_of(ctx)
    built = network(model, weights, usage_error)
    inputs = None if size is None else random_inputs([shape_of(size, usage_error)], built, usage_error)
    with library_errors(usage_error):
        layers = inspect_layers(built, inputs)
    if as_json:
        print_values("inspect", model=type(built).__name__, layers=layers)
    else:
        out = console(_WIDEST)
        from batchnorm.doctor.report.terminal import layer_table

        print_rich(layer_table(layers), out)
