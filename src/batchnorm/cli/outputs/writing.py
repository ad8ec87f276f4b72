"""Write the output file of a command completely or not at all, and never over another file by mistake."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click

from batchnorm.cli.errors import OneLineError, UsageErrorMaker
from batchnorm.files import check_target, whole_file


def output_options(metavar: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options `-o` and `--overwrite` to a command that writes one file."""
    output = click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        required=True,
        metavar=metavar,
        help=f"Where to write {what}.",
    )
    overwrite = click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
    return lambda command: output(overwrite(command))


def check_output(output: Path, overwrite: bool, usage_error: UsageErrorMaker) -> None:
    """Check the output path before anything is computed, which may take minutes."""
    try:
        check_target(output, overwrite=overwrite)
    except OSError as error:
        raise usage_error(str(error)) from error


@contextmanager
def open_output(output: Path, overwrite: bool, usage_error: UsageErrorMaker) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `output` if the block ends without an exception.

    Save results of torch with `save_in_memory` first: on a full disk, torch's own writer aborts the process later.
    """
    try:
        with whole_file(output, overwrite=overwrite) as part, part.open("wb") as file:
            yield file
    except OneLineError:
        raise
    except FileExistsError as error:
        raise usage_error(str(error)) from error
    except Exception as error:
        raise usage_error(f"{output} could not be written", error) from error


def save_in_memory(save: Callable[[Any, Any], object], value: object) -> memoryview:
    """Return the bytes that a function such as `torch.save` writes."""
    buffer = io.BytesIO()
    save(value, buffer)
    return buffer.getbuffer()
