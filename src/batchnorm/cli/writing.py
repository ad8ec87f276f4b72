"""Files that a verb writes: whole or not at all, and none by mistake in the place of another."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from batchnorm.cli.command import OneLineError
from batchnorm.cli.loading import Mistake


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
def whole_file(output: Path, mistake: Mistake) -> Iterator[BinaryIO]:
    """A file beside its place, to write to, which is moved there when the block ends well, and removed otherwise.

    torch saves into memory first: its own writer ends the process some time after a disk was full.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".batchnorm-", dir=output.parent) as folder:
            part = Path(folder) / output.name
            with part.open("wb") as file:
                yield file
            os.replace(part, output)
    except OneLineError:
        raise
    except Exception as error:
        raise mistake(f"{output} could not be written", error) from error
