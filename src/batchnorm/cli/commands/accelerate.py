"""The command `accelerate`."""

from __future__ import annotations

import click

from batchnorm.cli.errors import library_errors, usage_errors_of
from batchnorm.cli.inputs.loading import Weights, network, random_inputs, shape_of, weights_options
from batchnorm.cli.outputs.reporting import ReportingCommand, print_report


@click.command(cls=ReportingCommand)
@click.argument("model", metavar="MODULE.PATH:CALLABLE")
@weights_options
@click.option(
    "--input",
    "sizes",
    multiple=True,
    metavar="N,C,H,W",
    help="Shape of an input, such as 2,3,224,224; once for each argument. Rewritten modules are then compared with the "
    "original.",
)
@click.option(
    "--measure",
    is_flag=True,
    help="Time training steps of both networks on this machine, and change nothing unless the changed one is faster. "
    "--input must then be the shape used in training.",
)
@click.pass_context
def accelerate(
    ctx: click.Context, /, model: str, weights: Weights | None, sizes: tuple[str, ...], measure: bool, as_json: bool
) -> None:
    r"""Print what `batchnorm.accelerate` changes in a network for training, and what it leaves and why.

    This writes nothing. Call `batchnorm.accelerate` in your training script, after you create the network.

    \b
    Examples:
      batchnorm accelerate torchvision.models:resnet50 --input 2,3,224,224
      batchnorm accelerate torchvision.models:resnet50 --input 32,3,224,224 --measure
    """
    from batchnorm.surgery.accelerate.accelerate import accelerate as accelerate_network

    usage_error = usage_errors_of(ctx)
    shapes = [shape_of(text, usage_error) for text in sizes]
    if measure and not shapes:
        raise usage_error("--measure requires --input, got none. Add for example --input 32,3,224,224.")
    built = network(model, weights, usage_error)
    with library_errors(usage_error):
        inputs = random_inputs(shapes, built, usage_error) or None
        _, report = accelerate_network(built, inputs, inplace=True, measure=measure)
    print_report(report, as_json)
