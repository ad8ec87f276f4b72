"""Files that a verb writes: whole or not at all, and none by mistake in the place of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from batchnorm.cli.command import OneLineError
from batchnorm.cli.loading import Mistake
from batchnorm.files import whole_file


def output_options(metavar: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options `-o` and `--overwrite` of a verb that writes one file."""
    output = click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        required=True,
        metavar=metavar,
        help=f"Where to write {what}.",
    )
    overwrite = click.option("--overwrite", is_flag=True, help="Replace the file, if there is one.")
    return lambda verb: output(overwrite(verb))


def check_output(output: Path, overwrite: bool, mistake: Mistake) -> None:
    """Before anything is computed, which may take minutes."""
    if output.exists() and not overwrite:
        raise mistake(f"{output} must not exist yet. Choose another name, or give --overwrite.")
    if not output.parent.is_dir():
        raise mistake(f"{output} must be in a directory that exists, but {output.parent} is none. Make it first.")


@contextmanager
def open_output(output: Path, mistake: Mistake) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `output` when the block ends, unless by an exception.

    Results of torch are saved into memory first: its own writer aborts the process some time after a disk is full.
    """
    try:
        with whole_file(output) as part, part.open("wb") as file:
            yield file
    except OneLineError:
        raise
    except Exception as error:
        raise mistake(f"{output} could not be written", error) from error
