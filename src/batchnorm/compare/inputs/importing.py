"""Import the user's code by name, and report its errors."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from batchnorm import importing
from batchnorm.compare.errors import ComparisonError


def import_named(written: str, what: str) -> object:
    """Import `module.path:name`; modules in the working directory are found too.

    Args:
        written: The name as the user wrote it.
        what: The name of the argument, for errors: `model` or `data`.

    Raises:
        ComparisonError: If the module cannot be imported, or has no such name.
    """
    with user_code(written, "was imported", of="the module of"):
        module = importing.import_module(written)
    try:
        return importing.attribute_of(module, written)
    except AttributeError as error:
        raise ComparisonError(f"{what} {written!r} must name an object that exists, but {error}") from error


@contextmanager
def user_code(name: str, occasion: str, of: str = "the model") -> Iterator[None]:
    """Turn an exception of the user's code in the block into one line that says what failed, when and where."""
    try:
        yield
    except ComparisonError:
        raise
    except Exception as error:
        frame = _innermost_frame_of_the_user(error)
        place = f" ({Path(frame.filename).name}, line {frame.lineno})" if frame else ""
        what = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise ComparisonError(
            f"{of} {name} must run without errors when it {occasion}, but raised {what}{place}. Fix it and run again."
        ) from error


def _innermost_frame_of_the_user(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame that is neither in torch nor in this package."""
    libraries = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if not frame.filename.startswith(libraries)), None)
