"""The verb `accelerate`."""

from __future__ import annotations

import click

from batchnorm.cli.command import OneLineCommand
from batchnorm.cli.loading import mistakes_of, network, random_input, shape_of


@click.command(cls=OneLineCommand)
@click.argument("model", metavar="MODULE.PATH:CALLABLE")
@click.option(
    "--input",
    "sizes",
    multiple=True,
    metavar="N,C,H,W",
    help="Shape of an input, such as 2,3,224,224; once for each argument. What is rewritten is then compared with the "
    "original.",
)
@click.pass_context
def accelerate(ctx: click.Context, /, model: str, sizes: tuple[str, ...]) -> None:
    r"""Print what `batchnorm.accelerate` makes of a network for training, and what it leaves and why.

    Nothing is written: in a training script the call stands after the network is made.

    \b
    Examples:
      batchnorm accelerate torchvision.models:resnet50 --input 2,3,224,224
    """
    from batchnorm.surgery.accelerate.accelerate import accelerate as accelerate_network

    mistake = mistakes_of(ctx)
    shapes = [shape_of(text, mistake) for text in sizes]
    built = network(model, None, mistake)
    inputs = tuple(random_input(shape, built) for shape in shapes)
    try:
        _, report = accelerate_network(built, inputs or None, inplace=True)
    except (ValueError, TypeError) as error:
        raise mistake(str(error)) from error
    click.echo(str(report))
