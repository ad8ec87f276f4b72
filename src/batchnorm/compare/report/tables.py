"""The records of all runs as Parquet tables, one row per record. They need the package pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchnorm.compare.directory import TABLES, table_name
from batchnorm.compare.records import Run
from batchnorm.files import whole_file

Row = dict[str, Any]


def rows(runs: Sequence[Run]) -> dict[str, list[Row]]:
    """Return the rows of each table: choice and seed of the run, then the record."""
    found: dict[str, list[Row]] = {table: [] for table in TABLES}
    for run in runs:
        key = {**asdict(run.choice), "seed": run.seed}
        facts = {name: value for name, value in run.head.items() if name not in ("choice", "environment", "watched")}
        found["runs"].append({**key, **facts, "diverged_at": run.diverged_at, **run.environment})
        for table in TABLES[1:]:
            found[table] += [{**key, **asdict(record)} for record in getattr(run, table)]
    return found


def write(runs: Sequence[Run], directory: Path) -> None:
    """Write each table that has rows; delete an earlier file of a table that has none."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    for table, content in rows(runs).items():
        path = directory / table_name(table)
        if not content:
            path.unlink(missing_ok=True)
            continue
        with whole_file(path) as temporary:
            parquet.write_table(pyarrow.Table.from_pylist(content), temporary)
