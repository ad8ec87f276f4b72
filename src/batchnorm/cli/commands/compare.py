"""The command `compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from batchnorm._options import as_clause
from batchnorm.cli.errors import OneLineError
from batchnorm.cli.exit_codes import INTERRUPTED
from batchnorm.cli.outputs.reporting import ReportingCommand, print_values
from batchnorm.cli.syntax import SeveralValues

WITH_REPORT = {"report", "target_accuracy", "records", "tensorboard"}


@click.command(cls=ReportingCommand)
@click.option(
    "--norms",
    cls=SeveralValues,
    commas=False,  # they also separate the options of a layer
    show_default="none batch; as-is for several networks",
    metavar="NAME...",
    help="Normalizations; the others are compared with the first. Options of a layer follow its name: "
    "batch:momentum=0.01. as-is leaves a network unchanged.",
)
@click.option(
    "--placement",
    cls=SeveralValues,
    default=["before"],
    show_default="before",
    metavar="before|after...",
    help="Normalize before or after the activation; with both, they are compared.",
)
@click.option(
    "--input-norm",
    is_flag=True,
    help="Normalize the inputs with a layer without scale and shift, instead of standardizing the data.",
)
@click.option(
    "--model",
    cls=SeveralValues,
    default=["mlp"],
    show_default="mlp",
    metavar="NAME|MODULE.PATH:CALLABLE...",
    help="mlp, sigmoid-mlp, cnn, resnet20 or vgg; or a callable that takes (norm, in_shape, num_classes) and returns a "
    "torch.nn.Module; or one without arguments: the batch normalization of its network is replaced. Several networks "
    "of your own are compared with each other unchanged.",
)
@click.option(
    "--data",
    default="mnist-mini",
    metavar="NAME|FILE.npz|MODULE.PATH:CALLABLE",
    help="mnist-mini, mnist, fashion-mnist or digits; or a file with x_train, y_train, x_test, y_test.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with the data's official files, instead of downloading them.",
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
    help="How batches are drawn; with classes:2, each batch has samples of two classes.",
)
@click.option(
    "--dropout",
    cls=SeveralValues,
    type=float,
    show_default="none; a finished network keeps its own",
    metavar="P...",
    help="Probability of dropout before each linear layer that reads hidden units; in a finished network, of its own "
    "dropout layers.",
)
@click.option("--epochs", type=int, show_default="10", metavar="N", help="Number of epochs.")
@click.option("--steps", type=int, metavar="N", help="Number of training steps, instead of epochs.")
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
    metavar="NAME",
    help="How the rate changes: constant, cosine, linear or step, optionally with a warm-up: cosine:warmup=100.",
)
@click.option(
    "--optimizer",
    default="sgd",
    metavar="NAME",
    help="sgd, momentum (SGD with momentum 0.9), adam, adamw or rmsprop.",
)
@click.option("--seeds", type=int, default=3, metavar="N", help="Number of seeds.")
@click.option(
    "--target-accuracy",
    type=float,
    default=0.95,
    metavar="SHARE",
    help="Test accuracy to reach, 0 to 1; the report says when each run reached it.",
)
@click.option(
    "--evaluate-every",
    type=int,
    metavar="N",
    help="Steps between evaluations; by default about 80 evaluations, at least 5 steps apart.",
)
@click.option(
    "--threads",
    type=int,
    default=1,
    metavar="N",
    help="Number of threads that torch uses; large networks benefit from more.",
)
@click.option("--device", default="cpu", metavar="NAME", help="Device to train on, such as cuda:0.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="batchnorm-compare/TIME",
    metavar="DIR",
    help="Directory for the report and all other output.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in the directory.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the comparison in the directory. Finished runs are not trained again, and omitted options keep "
    "their values. You may add networks, norms, rates, batch sizes and seeds.",
)
@click.option(
    "--records",
    default="jsonl",
    metavar="jsonl|parquet",
    help="parquet adds tables of all runs to the lines of JSON.",
)
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard logs of every run, too.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Train nothing; write the page of the comparison in that directory again, also if it is incomplete.",
)
@click.pass_context
def compare(ctx: click.Context, /, out: Path | None, report: Path | None, as_json: bool, **options: Any) -> None:
    r"""Train one network with several normalizations, or several networks, on the same data, and write a report.

    Several values of an option are separated by spaces or commas. Every combination is trained.

    \b
    Examples:
      batchnorm compare
      batchnorm compare --norms none batch --lr 0.1 0.5 --batch-size 8 64
      batchnorm compare --model net:build --data mine.npz --out result
      batchnorm compare --model nets:SimpleNet nets:SimpleNetBN
      batchnorm compare --resume --out result --seeds 5
      batchnorm compare --report result
    """
    from batchnorm import compare as comparison
    from batchnorm.compare.directory import SETTINGS
    from batchnorm.compare.resuming import earlier_arguments
    from batchnorm.compare.training.parallel import launched
    from batchnorm.memory import keep_memory

    process = launched()
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT} - {"as_json"}
    options |= {name: options[name] or None for name in ("norms", "lr", "dropout")}
    if out is None and not options["resume"]:
        out = comparison.default_directory()
    try:
        if report is not None:
            result = comparison.rebuild(report, **_of_report(ctx, given, options))
        else:
            if out is not None and options["resume"]:
                options |= _omitted(earlier_arguments(out), given)
            keep_memory()
            result = comparison.run(out=out, **options)
    except (comparison.ComparisonError, ModuleNotFoundError, OSError) as error:
        failed: int | None = getattr(error, "rank", None)
        if process.rank != (failed or 0):
            ctx.exit(2)  # the failed process prints the error
        message = str(error)
        if isinstance(error, OSError):
            name, where = ("report", report) if report is not None else ("out", out)
            why = f"{where} is not: {as_clause(error)}"
            message = f"{name} must be a writable directory, but {why}. Choose another with --{name}."
        raise OneLineError(ctx.command_path, message if failed is None else f"rank {failed}: {message}") from error
    except KeyboardInterrupt:
        if process.first and out is not None:
            runs = out / "runs"
            finished = len(list(runs.glob("*.jsonl")))
            what = f"{finished} finished {'run is' if finished == 1 else 'runs are'} in {runs}, without a summary. "
            what += f"Continue with: {ctx.command_path} --resume --out {out}"
            if not (out / SETTINGS).is_file():
                what = "training had not begun. Start again."
            print(f"{ctx.command_path}: interrupted; {what}", file=sys.stderr)
        ctx.exit(INTERRUPTED)
    if not process.first:
        return
    if as_json:
        files = {"out": str(result.out), "report": str(result.report_path)}
        print_values("compare", headline=result.headline, **files, summary=result.summary)
    else:
        print(result)


def _of_report(ctx: click.Context, given: set[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `rebuild` that the command line gives."""
    if given - WITH_REPORT:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in given - WITH_REPORT))
        raise OneLineError(
            ctx.command_path,
            "--report trains nothing, so it allows only --target-accuracy, --records and --tensorboard, got "
            f"{names}. Leave these out.",
        )
    return {name: options[name] for name in given - {"report"}}


def _omitted(earlier: dict[str, Any], given: set[str]) -> dict[str, Any]:
    """Return the earlier arguments that the command line does not set again."""
    length = {"epochs", "steps"}  # setting one replaces the other
    named = given | length if given & length else given
    return {name: value for name, value in earlier.items() if name not in named}
