"""Write numbers and layers as text, for findings and reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from batchnorm.text import printable


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number and its noun, such as `1 layer`; `plural` is needed for a phrase, such as `layers move`."""
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


def noise_at(path: str, batch_size: float, noise: float) -> str:
    """Return a clause that states the noise of a layer's batch statistics, in σ."""
    value = f"a normalized value at {named(path)} varies by {noise:.2g}σ"
    return f"with {batch_size:g} samples {value} with the rest of its batch"


def signed(value: float) -> str:
    """Return a number in three significant digits with its sign, a true minus."""
    return f"{value:+.3g}".replace("-", "−")
