"""The frameworks that this library supports. None of them is required, and each is an extra of the same name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_NAMES = {"torch": "PyTorch", "jax": "JAX", "flax": "Flax", "keras": "Keras"}
# The functions for PyTorch's models that `batchnorm.keras` has for Keras's, under the same names.
_FOR_KERAS = frozenset({"convert", "diagnose", "fold", "freeze", "recalibrate", "unfreeze"})


class MissingFrameworkError(ModuleNotFoundError):
    """A framework is not installed; `name` is its module, and the message says how to install it."""


def is_installed(framework: str) -> bool:
    """Return whether the framework can be imported, without importing it."""
    return sys.modules.get(framework) is not None or find_spec(framework) is not None


def keras_hint(function: str) -> str:
    """Return the sentence that names the function for Keras models, with a space before it; empty if there is none."""
    return f" For a Keras model use batchnorm.keras.{function}." if function in _FOR_KERAS else ""


@contextmanager
def required_by(what: str) -> Iterator[None]:
    """Name the extra to install if an import within the block does not find a framework.

    Blocks may be nested. The error names the outermost one, which is what the user asked for.

    Args:
        what: What is imported, such as `batchnorm.nn`.

    Raises:
        MissingFrameworkError: a framework was not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        framework = (error.name or "").partition(".")[0]
        if framework not in _NAMES:
            raise
        hint = keras_hint(what.removeprefix("batchnorm.")) if framework == "torch" and is_installed("keras") else ""
        raise MissingFrameworkError(
            f"{what} needs {_NAMES[framework]}, which is not installed; "
            f"run pip install 'batchnorm[{framework}]'.{hint}",
            name=framework,
        ) from (error.__cause__ if isinstance(error, MissingFrameworkError) else error)


def parts_on_demand(package: str, *modules: str, **functions: str) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports parts of the package when they are first used.

    Args:
        package: The package's name.
        modules: Modules of the package.
        functions: Other names, each with the package's module that holds it.
    """

    def attribute(name: str) -> Any:
        if name not in modules and name not in functions:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with required_by(f"{package}.{name}"):
            module = import_module(f"{package}.{functions.get(name, name)}")
        return getattr(module, name) if name in functions else module

    return attribute
