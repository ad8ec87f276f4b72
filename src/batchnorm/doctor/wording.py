"""Write numbers and layers as text, for findings and reports."""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from batchnorm.text import printable

# Code for the data set of a loader.
DATASET = "training_data.dataset"
# Code for arguments of a model that cannot be written.
EXAMPLE = "example_inputs"


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number and its noun, such as `1 layer`; `plural` is needed for a phrase, such as `layers move`."""
    return f"{number} {singular if number == 1 else plural or singular + ('es' if singular.endswith('ch') else 's')}"


def times(number: int) -> str:
    """Return `twice`, or a larger number of times."""
    return "twice" if number == 2 else f"{number} times"


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


def patterns(paths: Sequence[str], others: Collection[str], prefix: str = "") -> list[str]:
    """Return few patterns for `only=` that match these layers, whose paths begin with the prefix, and no others."""
    if len(paths) == 1:
        return [glob.escape(paths[0])]
    if not any(path.startswith(prefix) for path in others):
        return [f"{glob.escape(prefix)}*"]
    found: list[str] = []
    for name in dict.fromkeys(path[len(prefix) :].partition(".")[0] for path in paths):
        inner = [path for path in paths if path.startswith(f"{prefix}{name}.")]
        found += [glob.escape(prefix + name)] if prefix + name in paths else []
        found += patterns(inner, others, f"{prefix}{name}.") if inner else []
    return found


def noise_at(path: str, batch_size: float, noise: float) -> str:
    """Return a clause that states the noise of a layer's batch statistics, in σ."""
    value = f"a normalized value at {named(path)} varies by {noise:.2g}σ"
    return f"with {batch_size:g} samples {value} with the rest of its batch"


def figure(value: float) -> str:
    """Return a number in three significant digits, or whole from a thousand to a million."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def signed(value: float) -> str:
    """Return a number in three significant digits with its sign, a true minus."""
    return f"{value:+.3g}".replace("-", "−")


def samples_as_code(data: Any, batch: Any) -> str:
    """Return code for a data set of the samples of `training_data`; `batch` is a batch of these `data`."""
    if hasattr(data, "dataset"):
        return DATASET
    samples = "batch"
    if isinstance(batch, Mapping):
        samples = "(dict(zip(batch, values)) for values in zip(*batch.values()))"
    elif isinstance(batch, (tuple, list)):
        samples = "zip(*batch)"
    return f"[sample for batch in training_data for sample in {samples}]"


def loader_as_code(dataset: str, options: str = "") -> str:
    """Return code for a loader that draws batches of random samples."""
    return f"loader = torch.utils.data.DataLoader({dataset}, batch_size=64, shuffle=True{options})"


def example_as_code(values: Iterable[Any], names: Iterable[str] = ()) -> str:
    """Return code for random arguments of a model with the shapes of these; `example_inputs` if one is not a tensor."""
    code = list(map(_tensor_as_code, values))
    if not code or "" in code:
        return EXAMPLE
    names = list(names)
    if names:
        return f"dict({', '.join(f'{name}={one}' for name, one in zip(names, code, strict=True))})"
    return code[0] if len(code) == 1 else f"({', '.join(code)})"


def _tensor_as_code(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), str(getattr(value, "dtype", ""))
    if shape is None or not dtype:
        return ""
    sizes = ", ".join(map(str, shape)) or "()"
    options = "" if dtype == "torch.float32" else f", dtype={dtype}"
    options += "" if str(value.device) == "cpu" else f', device="{value.device}"'
    return f"torch.{'randn' if value.is_floating_point() else 'zeros'}({sizes}{options})"


def explain_command(code: str) -> str:
    """Return the command that prints the documentation of a code."""
    return f"batchnorm explain {code}"
