"""The verb `compare`."""

from __future__ import annotations

from pathlib import Path

import click

from batchnorm.cli import INTERRUPTED
from batchnorm.cli.command import OneLineCommand, OneLineError, SeveralValues


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
    "--model",
    default="mlp",
    show_default=True,
    metavar="mlp|MODULE.PATH:CALLABLE",
    help="The network. A callable gets (norm, in_shape, num_classes) and returns a torch.nn.Module.",
)
@click.option(
    "--data",
    default="mnist-mini",
    show_default=True,
    metavar="mnist-mini|FILE.npz",
    help="What to train and test on. A file holds x_train, y_train, x_test, y_test.",
)
@click.option("--batch-size", type=int, default=64, show_default=True, metavar="N", help="Samples in a step.")
@click.option(
    "--sampling",
    default="iid",
    show_default=True,
    metavar="iid|classes:K",
    help="How batches are drawn; classes:2 gives each batch samples of two classes.",
)
@click.option("--epochs", type=int, show_default="10", metavar="N", help="Passes over the training data.")
@click.option("--steps", type=int, metavar="N", help="Training steps, instead of epochs.")
@click.option(
    "--lr", type=float, show_default="the optimizer's: 0.1 for sgd", metavar="RATE", help="Learning rate, constant."
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
@click.option("--evaluate-every", type=int, metavar="N", help="Steps between looks at the test set; about 80 in all.")
@click.option(
    "--threads",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Threads that torch computes with; large networks want more.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    show_default="batchnorm-compare/TIME",
    metavar="DIR",
    help="Directory for the report and everything else.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in the directory.")
@click.pass_context
def compare(ctx: click.Context, /, out: Path | None, norms: tuple[str, ...], **options: object) -> None:
    r"""Train one network with several normalizations on the same data, and write a report.

    \b
    Examples:
      batchnorm compare
      batchnorm compare --norms none batch --lr 0.5 --steps 500
      batchnorm compare --model net:build --data mine.npz --out result
    """
    from batchnorm import compare as comparison
    from batchnorm.compare.parallel import launched

    here = launched()
    out = out if out is not None else comparison.default_directory()
    try:
        result = comparison.run(norms, out=out, **options)  # type: ignore[arg-type]
    except (comparison.ComparisonError, ModuleNotFoundError, OSError) as error:
        failed: int | None = getattr(error, "rank", None)
        if here.rank != (failed or 0):
            ctx.exit(2)  # that process says why
        message = str(error)
        if isinstance(error, OSError):
            message = (
                f"out must be a directory that can be written to, but {out} gave: {error}. Choose another with --out."
            )
        raise OneLineError(ctx.command_path, message if failed is None else f"rank {failed}: {message}") from error
    except KeyboardInterrupt:
        if here.first:
            runs = out / "runs"
            whole = len(list(runs.glob("*.jsonl")))
            click.echo(
                f"{ctx.command_path}: interrupted; {whole} finished runs lie in {runs}, no summary was written.",
                err=True,
            )
        ctx.exit(INTERRUPTED)
    if here.first:
        click.echo(str(result))
