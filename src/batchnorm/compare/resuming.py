"""Check whether a comparison can continue an earlier one in the same directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from batchnorm.compare.directory import read_facts
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.data import KEYS, Data
from batchnorm.compare.inputs.settings import SEVERAL, Settings


def fingerprint(data: Data) -> str:
    """Return a hash of the training and test data."""
    content = hashlib.blake2b(digest_size=16)
    for key in KEYS:
        tensor = getattr(data, key)
        content.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        content.update(tensor.detach().cpu().contiguous().numpy().data)
    return content.hexdigest()


def check_same(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a comparison can reuse the finished runs of an earlier one.

    Args:
        directory: The directory of the earlier comparison.
        before: The facts of the earlier comparison.
        now: The facts of this one.

    Raises:
        ComparisonError: If a setting that decides a run's result differs, or the earlier comparison has values that
            this one leaves out.
    """
    old, new = Settings.read(before["settings"]), Settings.read(now["settings"])
    pairs = {name: (value, new.deciding[name]) for name, value in old.deciding.items()}
    pairs["content of data"] = (before["data"]["fingerprint"], now["data"]["fingerprint"])
    pairs["processes"] = (before["processes"], now["processes"])
    differing = [f"{name} was {was!r} and is {now!r}" for name, (was, now) in pairs.items() if was != now]
    if differing:
        raise ComparisonError(
            f"to resume, every setting that decides a run's result must be as in {directory}, but "
            f"{'; '.join(differing)}. Repeat the original settings, or choose another directory."
        )
    names = {field: name for name, field in SEVERAL.items()}
    lacking = [
        f"{names[field]} {', '.join(map(str, values))}" for field, values in old.grid.missing_from(new.grid).items()
    ]
    if old.seeds > new.seeds:
        lacking.append(f"{old.seeds} seeds")
    if lacking:
        raise ComparisonError(
            f"to resume, every value that {directory} compares must be given again, but this call lacks "
            f"{'; '.join(lacking)}. Repeat the original values (you may add more), or choose another directory."
        )


def earlier_facts(directory: Path) -> dict[str, Any]:
    """Return the facts that the comparison in the directory wrote before training.

    Raises:
        ComparisonError: If there is no comparison, or another version of the package wrote it.
    """
    facts = read_facts(directory)
    if facts is None:
        missing = "has no settings.json" if directory.is_dir() else "does not exist"
        raise ComparisonError(
            f"to resume, out must be the directory of an earlier comparison, but {directory} {missing}. Check the "
            "path, or start a comparison there without resume (--resume)."
        )
    return facts


def earlier_arguments(directory: str | Path) -> dict[str, Any]:
    """Return the arguments of `run` that started a comparison.

    Args:
        directory: The `out` of a comparison.

    Raises:
        ComparisonError: If there is no comparison, or another version of the package wrote it.
    """
    return Settings.read(earlier_facts(Path(directory))["settings"]).arguments
