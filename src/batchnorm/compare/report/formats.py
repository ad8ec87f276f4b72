"""The output formats of a comparison, and the packages they need."""

from __future__ import annotations

import importlib.util

from batchnorm.compare.errors import check_among

EXTRAS = ("jinja2", "matplotlib", "rich", "scipy")
RECORDS = ("jsonl", "parquet")


def check_formats(records: str, tensorboard: bool) -> None:
    """Check that every requested output can be written.

    Raises:
        ComparisonError: If there is no such format of records.
        ModuleNotFoundError: If a package is missing.
    """
    _require(EXTRAS, "a comparison", "compare")
    check_among("records", records, RECORDS)
    if records == "parquet":
        _require(("pyarrow",), "records='parquet' (--records parquet)", "parquet")
    if tensorboard:
        _require(("tensorboard",), "tensorboard=True (--tensorboard)", "tensorboard")


def _require(packages: tuple[str, ...], purpose: str, extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{purpose} needs {', '.join(packages)}, but {', '.join(missing)} cannot be imported. Install with: "
            f"pip install 'batchnorm[{extra}]'",
            name=missing[0],
        )
