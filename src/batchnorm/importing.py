"""Import objects that the user names as `module.path:name`."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def is_named(written: str) -> bool:
    """Return whether the text has the form `module.path:name`."""
    path, colon, name = written.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*path.split("."), *name.split(".")))


def import_module(written: str) -> ModuleType:
    """Import the module of `module.path:name`, also from the working directory; all its exceptions propagate."""
    with working_directory_importable():
        return importlib.import_module(written.partition(":")[0])


def attribute_of(module: ModuleType, written: str) -> Any:
    """Return the object of `module.path:name` from its module.

    Raises:
        AttributeError: the module has no such object; the message suggests a similar name.
    """
    path, _, name = written.partition(":")
    target: Any = module
    for attribute in name.split("."):
        if not hasattr(target, attribute):
            close = difflib.get_close_matches(attribute, dir(target), n=1)
            hint = f"Did you mean {close[0]}?" if close else "Check the name after the colon."
            raise AttributeError(f"{path} has no {attribute!r}. {hint}")
        target = getattr(target, attribute)
    return target


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Make modules in the working directory importable within the block, as `python -m` does."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before
