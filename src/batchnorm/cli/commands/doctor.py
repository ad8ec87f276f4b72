"""The command `doctor`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchnorm.cli.errors import OneLineError, UsageErrorMaker, running_on_data, usage_errors_of
from batchnorm.cli.inputs.loading import (
    COUNT,
    Weights,
    batch_size_option,
    batches,
    import_named,
    network,
    weights_options,
)
from batchnorm.cli.outputs.reporting import ReportingCommand, print_json
from batchnorm.cli.outputs.terminal import console, print_rich, shows_progress
from batchnorm.cli.outputs.writing import check_output
from batchnorm.cli.syntax import complete_files
from batchnorm.text import printable

if TYPE_CHECKING:
    from torch import nn

_LEVELS = ("note", "warning", "error")


@click.command(cls=ReportingCommand)
@click.argument("model", metavar="MODULE.PATH:CALLABLE")
@weights_options
@click.option(
    "--data",
    shell_complete=complete_files,
    metavar="MODULE.PATH:CALLABLE|FILE.npz",
    help="Training batches: a callable that returns an iterable of batches, or a file with x, and y "
    "if there are targets (or x_train and y_train), which is shuffled.",
)
@click.option(
    "--loss",
    metavar="cross-entropy|mse|MODULE.PATH:CALLABLE",
    help="Loss of output and target; by default, the loss that the model computes. Without any, costs are changes of "
    "the output.",
)
@batch_size_option
@click.option(
    "--max-samples",
    type=COUNT,
    default=1000,
    metavar="N",
    help="Samples to read.",
)
@click.option(
    "--budget",
    type=click.IntRange(0, COUNT.max),
    default=5,
    metavar="N",
    help="Number of passes over the data for single layers, in addition to three for all layers.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.json|FILE.txt",
    help="Also write the diagnosis to a file.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Also write the diagnosis as a self-contained page with charts (needs jinja2 and markdown-it-py).",
)
@click.option(
    "--fail-on",
    type=click.Choice(_LEVELS),
    default="error",
    help="Exit with 1 if a finding is at least this severe.",
)
@click.pass_context
def doctor(
    ctx: click.Context,
    /,
    model: str,
    weights: Weights | None,
    data: str | None,
    loss: str | None,
    batch_size: int,
    max_samples: int,
    budget: int,
    output: Path | None,
    html: Path | None,
    fail_on: str,
    as_json: bool,
) -> None:
    r"""Find problems with the batch normalization of a network, with evidence and a fix.

    The exit code is 0 if the network is healthy, 1 if there are findings (see --fail-on), 2 after a usage error. Output
    that cannot be printed does not change it.

    \b
    Examples:
      batchnorm doctor net:build --weights net.pth
      batchnorm doctor net:build --weights net.pth --data net:loader --loss cross-entropy --html bn.html
      batchnorm doctor net:build --data mine.npz --fail-on warning --json
    """
    from batchnorm.doctor import Severity, diagnose

    usage_error = usage_errors_of(ctx)
    _check_files(output, html, usage_error)
    if not as_json:
        console()  # raises an error now if rich is missing
    built = network(model, weights, usage_error)
    if weights is not None:
        _print_momentum(built, model, weights.path)
    given = None if data is None else batches(data, batch_size, usage_error)
    criterion = None if loss is None else _loss(loss, usage_error)
    with running_on_data("diagnose", usage_error):
        found = diagnose(
            built, given, loss=criterion, max_samples=max_samples, budget=budget, progress=shows_progress()
        )
    failed: list[OneLineError] = []
    for path in (output, html):  # before printing, which may fail
        if path is not None:
            try:
                found.save(path)
            except OSError as error:
                failed.append(usage_error(f"{path} could not be written", error))
    if as_json:
        print_json(found.to_json())
    else:
        print_rich(found, console())
    for failure in failed:
        raise failure
    if found.worst is not None and found.worst >= Severity[fail_on.upper()]:
        ctx.exit(1)


def _print_momentum(built: nn.Module, model: str, path: Path) -> None:
    """Print on standard error which momentum is examined, because a state_dict does not hold it."""
    from batchnorm.walk import norm_layers

    known = [found.module.momentum for found in norm_layers(built) if hasattr(found.module, "momentum")]
    values = sorted({"None" if momentum is None else f"{momentum:g}" for momentum in known})
    if values:
        line = f"Using the momentum {', '.join(values)} of {model}, because {path} does not store one."
        print(printable(f"{line} If training used another value, set it there."), file=sys.stderr, flush=True)


def _check_files(output: Path | None, html: Path | None, usage_error: UsageErrorMaker) -> None:
    """Check the files before the model runs, which may take minutes."""
    if output is not None and output.suffix not in (".json", ".txt"):
        raise usage_error(
            f"--output must end in .json or .txt, got {output}. Change the name, or use --html for a page."
        )
    if html is not None and html.suffix != ".html":
        raise usage_error(f"--html must end in .html, got {html}. Change the name.")
    if html is not None and find_spec("jinja2") is None:
        raise usage_error("jinja2, which renders the page, is not installed. Run pip install 'batchnorm[doctor]'.")
    for path in (output, html):
        if path is not None:
            check_output(path, True, usage_error)


def _loss(name: str, usage_error: UsageErrorMaker) -> Any:
    from torch.nn import functional as F

    return {"cross-entropy": F.cross_entropy, "mse": F.mse_loss}.get(name) or import_named(name, "--loss", usage_error)
