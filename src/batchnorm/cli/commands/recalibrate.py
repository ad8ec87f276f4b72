"""The command `recalibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli.errors import running_on_data, usage_errors_of
from batchnorm.cli.inputs.loading import COUNT, Weights, batch_size_option, batches, network, weights_options
from batchnorm.cli.outputs.reporting import ReportingCommand, print_report
from batchnorm.cli.outputs.terminal import shows_progress
from batchnorm.cli.outputs.writing import check_output, open_output, output_options, save_in_memory
from batchnorm.cli.syntax import SeveralValues, complete_files


@click.command(cls=ReportingCommand)
@click.argument("model", metavar="MODULE.PATH:CALLABLE")
@weights_options
@click.option(
    "--data",
    shell_complete=complete_files,
    required=True,
    metavar="MODULE.PATH:CALLABLE|FILE.npz",
    help="Data as the model will see them, with or without labels: a callable that returns an iterable of batches, "
    "or a file with x (or x_train), which is shuffled.",
)
@batch_size_option
@click.option("--max-samples", type=COUNT, metavar="N", help="Stop after the batch that reaches N samples.")
@click.option(
    "--passes",
    type=click.Choice(("single", "sequential")),
    default="single",
    help="One pass for all layers, or layer by layer from the input.",
)
@click.option(
    "--prior",
    type=click.FloatRange(0),
    default=0.0,
    metavar="N",
    help="Number of samples that the old statistics count as.",
)
@click.option("--only", cls=SeveralValues, metavar="PATTERN...", help="Layers, such as 'backbone.*'; by default all.")
@output_options("FILE.pth", "the state_dict of the network with its new statistics")
@click.pass_context
def recalibrate(
    ctx: click.Context,
    /,
    model: str,
    weights: Weights | None,
    data: str,
    batch_size: int,
    max_samples: int | None,
    passes: str,
    prior: float,
    only: tuple[str, ...],
    output: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    r"""Set a network's running statistics to the exact statistics of data, and print how far off each layer was.

    \b
    Examples:
      batchnorm recalibrate net:build --weights net.pth --data net:loader -o recalibrated.pth
      batchnorm recalibrate net:build --weights net.pth --data photos.npz --prior 1000 -o adapted.pth
    """
    import torch

    from batchnorm.recalibration import recalibrate as recalibrate_network

    usage_error = usage_errors_of(ctx)
    check_output(output, overwrite, usage_error)
    built = network(model, weights, usage_error)
    given = batches(data, batch_size, usage_error)
    with running_on_data("recalibrate", usage_error):
        recalibrated, report = recalibrate_network(
            built,
            given,
            only=only or None,
            passes=passes,
            prior=prior,
            max_samples=max_samples,
            progress=shows_progress(),
            inplace=True,
        )
    with open_output(output, overwrite, usage_error) as file:
        file.write(save_in_memory(torch.save, recalibrated.state_dict()))
    print_report(report, as_json, output)
