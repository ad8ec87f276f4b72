"""Whether a comparison continues the one that lies in its directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from batchnorm.compare.directory import read_facts
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.data import Data
from batchnorm.compare.training.settings import SEVERAL, Settings


def fingerprint(data: Data) -> str:
    """Returns a hash of what is trained and tested on."""
    content = hashlib.blake2b(digest_size=16)
    for tensor in (data.x_train, data.y_train, data.x_test, data.y_test):
        content.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        content.update(tensor.detach().cpu().contiguous().numpy().data)
    return content.hexdigest()


def check_same(directory: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that a comparison can go on with the finished runs of an earlier one.

    Args:
        directory: Where that lies.
        before: Its facts.
        now: The facts of this one.

    Raises:
        ComparisonError: If something that decides a run's result differs, or this one leaves out what that one has.
    """
    old, new = Settings.read(before["settings"]), Settings.read(now["settings"])
    pairs = {name: (value, new.deciding[name]) for name, value in old.deciding.items()}
    pairs["content of data"] = (before["data"]["fingerprint"], now["data"]["fingerprint"])
    pairs["processes"] = (before["processes"], now["processes"])
    differing = [f"{name} was {was!r} and is {now!r}" for name, (was, now) in pairs.items() if was != now]
    if differing:
        raise ComparisonError(
            f"to resume, all that decides a run's result must be as in {directory}, but {'; '.join(differing)}. Give "
            "the same again, or choose another directory."
        )
    names = {field: name for name, field in SEVERAL.items()}
    lacking = [
        f"{names[field]} {', '.join(map(str, values))}" for field, values in old.grid.missing_from(new.grid).items()
    ]
    if old.seeds > new.seeds:
        lacking.append(f"{old.seeds} seeds")
    if lacking:
        raise ComparisonError(
            f"to resume, all that {directory} compares must be named again, and more can be, but now lacks "
            f"{'; '.join(lacking)}. Name these too, or choose another directory."
        )


def earlier_arguments(directory: str | Path) -> dict[str, Any]:
    """Returns the arguments of `run` that made a comparison; none where there is no comparison yet.

    Args:
        directory: The `out` of a comparison.

    Raises:
        ComparisonError: If another version of the package wrote it.
    """
    facts = read_facts(Path(directory))
    return {} if facts is None else Settings.read(facts["settings"]).arguments
