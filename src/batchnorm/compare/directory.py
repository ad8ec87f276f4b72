"""The output directory of a comparison: its files, and how they are written.

A run's file keeps the suffix `.partial` until its last line is written. Every other file is written under another name
and renamed once it is complete. A file under its final name is therefore always complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchnorm._options import as_clause
from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.records import Record, Recorder, Run
from batchnorm.files import write_whole

SETTINGS, SUMMARY, REPORT, RUNS, BOARDS, PARTIAL = (
    "settings.json", "summary.json", "report.html", "runs", "tensorboard", ".partial",
)  # fmt: skip
PICTURES = ("accuracy.png", "loss.png", "activations.png", "layers.png", "grid.png")
TABLES = ("runs", "steps", "evaluations", "histograms", "distributions", "layers")
SCHEMA = 3


def prepare(directory: Path, overwrite: bool) -> None:
    """Make a directory ready for a new comparison.

    Args:
        directory: Created if it does not exist.
        overwrite: Whether to delete the files of an earlier comparison in it. Other files stay.

    Raises:
        ComparisonError: If it holds an earlier comparison and `overwrite` is False.
        OSError: If it cannot be created or written to.
    """
    (directory / RUNS).mkdir(parents=True, exist_ok=True)
    ours = [directory / name for name in (SUMMARY, REPORT, SETTINGS, *PICTURES, *map(table_name, TABLES), BOARDS)]
    ours += [*(directory / RUNS).glob("*.jsonl"), *(directory / RUNS).glob(f"*.jsonl{PARTIAL}")]
    found = [path for path in ours if path.exists()]
    if found and not overwrite:
        raise ComparisonError(
            f"out must not hold an earlier comparison, but {directory} has {found[0].name}. Choose another "
            "directory, continue that comparison with resume (--resume), or replace it with overwrite (--overwrite)."
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_facts(directory: Path) -> dict[str, Any] | None:
    """Return the content of `settings.json`, which a comparison writes before training; None if there is no such file.

    Raises:
        ComparisonError: If another version of the package wrote the file, or it cannot be read.
    """
    path = directory / SETTINGS
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = facts.get("schema")
    except (ValueError, AttributeError) as error:
        raise ComparisonError(
            f"{path} must be the settings of a comparison, but reading it failed: {as_clause(error)}. Choose "
            "another directory."
        ) from error
    if schema != SCHEMA:
        raise ComparisonError(
            f"{path} must have schema {SCHEMA}, got {schema!r}: another version of batchnorm wrote it. Use that "
            "version, or choose another directory."
        )
    return facts


def finished_runs(directory: Path) -> list[Run]:
    """Return the runs that finished training; incomplete files are skipped."""
    found = []
    for path in sorted((directory / RUNS).glob("*.jsonl")):
        try:
            found.append(Run.read(path))
        except (ValueError, KeyError, TypeError):
            continue
    return found


@contextmanager
def recording(run: Run, directory: Path, *listeners: Callable[[Record], None]) -> Iterator[Recorder]:
    """Open the run's file, which gets its final name if the block ends without an exception."""
    path = directory / RUNS / run.file_name
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        yield Recorder(run, file, *listeners)
    partial.replace(path)


def table_name(table: str) -> str:
    """Return the file name of a table."""
    return f"{table}.parquet"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, completely or not at all."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
