"""The verb `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from batchnorm.cli import INTERRUPTED
from batchnorm.cli.command import OneLineCommand, OneLineError, SeveralValues

WITH_REPORT = {"report", "target_accuracy", "records", "tensorboard"}


@click.command(cls=OneLineCommand)
@click.option(
    "--norms",
    cls=SeveralValues,
    default=["none", "batch"],
    show_default="none batch",
    metavar="NAME...",
    help="Normalizations to compare; the others are set against the first. Options of a layer follow its name: "
    "batch:momentum=0.01.",
)
@click.option(
    "--placement",
    cls=SeveralValues,
    default=["before"],
    show_default="before",
    metavar="before|after...",
    help="Where they stand, before or after the activation; both are compared where both are named.",
)
@click.option(
    "--input-norm",
    is_flag=True,
    help="A normalization without scale and shift before the first layer, instead of standardized data.",
)
@click.option(
    "--model",
    default="mlp",
    show_default=True,
    metavar="NAME|MODULE.PATH:CALLABLE",
    help="mlp, sigmoid-mlp, cnn, resnet20 or vgg; or a callable that gets (norm, in_shape, num_classes) and returns a "
    "torch.nn.Module; or one without arguments, whose batch normalization is converted.",
)
@click.option(
    "--data",
    default="mnist-mini",
    show_default=True,
    metavar="NAME|FILE.npz|MODULE.PATH:CALLABLE",
    help="mnist-mini, mnist, fashion-mnist or digits; or a file with x_train, y_train, x_test, y_test.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the data's official files, instead of fetching them.",
)
@click.option(
    "--batch-size",
    cls=SeveralValues,
    type=int,
    default=[64],
    show_default="64",
    metavar="N...",
    help="Samples in a step.",
)
@click.option(
    "--sampling",
    cls=SeveralValues,
    default=["iid"],
    show_default="iid",
    metavar="iid|classes:K...",
    help="How batches are drawn; classes:2 gives each batch samples of two classes.",
)
@click.option("--epochs", type=int, show_default="10", metavar="N", help="Passes over the training data.")
@click.option("--steps", type=int, metavar="N", help="Training steps, instead of epochs.")
@click.option(
    "--lr",
    cls=SeveralValues,
    type=float,
    show_default="the optimizer's: 0.1 for sgd",
    metavar="RATE...",
    help="Learning rates; every combination of several values is trained.",
)
@click.option(
    "--schedule",
    default="constant",
    show_default=True,
    metavar="NAME",
    help="How the rate changes: constant, cosine, linear or step, each with a warm-up if wanted: cosine:warmup=100.",
)
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    metavar="NAME",
    help="sgd, momentum (SGD with momentum 0.9), adam, adamw or rmsprop.",
)
@click.option("--seeds", type=int, default=3, show_default=True, metavar="N", help="How many seeds.")
@click.option(
    "--target-accuracy",
    type=float,
    default=0.95,
    show_default=True,
    metavar="SHARE",
    help="Test accuracy whose first reaching is reported, 0 to 1.",
)
@click.option(
    "--evaluate-every",
    type=int,
    metavar="N",
    help="Steps between looks at the test set; else about 80 looks, at least 5 steps apart.",
)
@click.option(
    "--threads",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Threads that torch computes with; large networks want more.",
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where to train, such as cuda:0.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="batchnorm-compare/TIME",
    metavar="DIR",
    help="Directory for the report and everything else.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in the directory.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the comparison in the directory: what is finished is not trained again, options that are not given "
    "are as before, and more norms, rates, batch sizes and seeds can be named.",
)
@click.option(
    "--records",
    default="jsonl",
    show_default=True,
    metavar="jsonl|parquet",
    help="parquet writes tables of all runs beside the lines of JSON.",
)
@click.option("--tensorboard", is_flag=True, help="Show every run in TensorBoard, too.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Train nothing: write the page of the comparison in that directory anew, finished or not.",
)
@click.pass_context
def compare(ctx: click.Context, /, out: Path | None, report: Path | None, **options: Any) -> None:
    r"""Train one network with several normalizations on the same data, and write a report.

    \b
    Examples:
      batchnorm compare
      batchnorm compare --norms none batch --lr 0.1 0.5 --batch-size 8 64
      batchnorm compare --model net:build --data mine.npz --out result
      batchnorm compare --resume --out result --seeds 5
      batchnorm compare --report result
    """
    from batchnorm import compare as comparison
    from batchnorm.compare.resuming import earlier_arguments
    from batchnorm.compare.training.parallel import launched

    here = launched()
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT}
    options["lr"] = options["lr"] or None
    if out is None and not options["resume"]:
        out = comparison.default_directory()
    try:
        if report is not None:
            result = comparison.rebuild(report, **_of_report(ctx, given, options))
        else:
            if out is not None and options["resume"]:
                options |= _not_given(earlier_arguments(out), given)
            result = comparison.run(out=out, **options)
    except (comparison.ComparisonError, ModuleNotFoundError, OSError) as error:
        failed: int | None = getattr(error, "rank", None)
        if here.rank != (failed or 0):
            ctx.exit(2)  # that process says why
        message = str(error)
        if isinstance(error, OSError):
            name, where = ("report", report) if report is not None else ("out", out)
            message = (
                f"{name} must be a directory that can be written to, but {where} gave: {error}. Choose another with "
                f"--{name}."
            )
        raise OneLineError(ctx.command_path, message if failed is None else f"rank {failed}: {message}") from error
    except KeyboardInterrupt:
        if here.first and out is not None:
            runs = out / "runs"
            whole = len(list(runs.glob("*.jsonl")))
            click.echo(
                f"{ctx.command_path}: interrupted; {whole} finished runs lie in {runs}, no summary was written. "
                f"Continue with: {ctx.command_path} --resume --out {out}",
                err=True,
            )
        ctx.exit(INTERRUPTED)
    if here.first:
        click.echo(str(result))


def _of_report(ctx: click.Context, given: set[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return what `rebuild` is to be told."""
    if given - WITH_REPORT:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in given - WITH_REPORT))
        raise OneLineError(
            ctx.command_path,
            "--report trains nothing, so it goes only with --target-accuracy, --records and --tensorboard, got "
            f"{names}. Leave these out.",
        )
    return {name: options[name] for name in given - {"report"}}


def _not_given(earlier: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return the earlier arguments that the command line does not name again."""
    length = {"epochs", "steps"}  # one stands for both
    named = given | length if given & length else given
    return {name: value for name, value in earlier.items() if name not in named}
