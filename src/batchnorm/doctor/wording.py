"""Numbers and layers in words, for findings and reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from batchnorm.text import printable


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun, such as `1 layer`; with a verb where `plural` is given, as `layers move`."""
    return f"{number} {singular if number == 1 else plural or singular + ('es' if singular.endswith('ch') else 's')}"


def listed(paths: Iterable[str], most: int = 4) -> str:
    """Return the first paths, and how many more there are."""
    names = [named(path) for path in paths]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def layers_listed(paths: Collection[str]) -> str:
    """Return the number of layers and the first paths, such as `2 layers: a, b`."""
    return f"{counted(len(paths), 'layer')}: {listed(paths)}"


def named(path: str) -> str:
    """Return the path of a layer, with control characters escaped, or `(model)` for a model that is itself a layer."""
    return printable(path) or "(model)"


def signed(value: float) -> str:
    """Return a number in three significant digits with its sign, a true minus."""
    return f"{value:+.3g}".replace("-", "−")
