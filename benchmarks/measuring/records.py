"""Results as CSV files, with the machine and the versions; a file gets its name when it is complete."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import batchnorm
from benchmarks.measuring.busy import Busy

Row = dict[str, Any]

# An allocator setting is a set of environment variables. `keep_memory` is also called for those that begin with "kept".
ALLOCATORS: dict[str, dict[str, str]] = {"default": {}, "kept": {}}
RESERVED = "kept, reserved"
RESERVE = 2 << 30
LAST_LEVEL_DEFAULT = 32 << 20


def set_allocator(setting: str) -> batchnorm.MemoryReport:
    """Change this process's allocator as the setting says; raise if that has no effect."""
    keep = setting.startswith("kept")
    report = batchnorm.keep_memory(keep, reserve=RESERVE if setting == RESERVED else 0)
    if sys.platform == "linux" and keep and not report.kept:
        raise RuntimeError(f"the allocator must keep memory for the setting {setting!r}; {report}")
    return report


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def processor() -> str:
    """Return the processor's name, with family and model on Linux."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    return name


def last_level_cache() -> int:
    """Return the bytes of the largest cache that the first processor core sees."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [
        int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())
    ]
    return max(sizes, default=LAST_LEVEL_DEFAULT)


@functools.cache
def environment() -> Row:
    """Return the columns of every row that describe the environment."""
    commit = _git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = bool(_git("status", "--porcelain", "--", "src", "csrc", "CMakeLists.txt", "benchmarks/*.py"))
    return {
        "commit": commit + ("+changes" if changed else ""),
        "implementation": batchnorm.backends()["cpu"],
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "jax", "onnxruntime")},
        "processor": processor(),
        "cores": os.cpu_count(),
        "cache_bytes": last_level_cache(),
    }


class Table:
    """A CSV file that is written row by row under a temporary name, and renamed when it is complete.

    Args:
        path: Path of the complete file; until then it is `path` + ".partial".
        key: The columns that identify a measurement.
    """

    def __init__(self, path: Path, key: tuple[str, ...]) -> None:
        self.path, self.key = path, key
        self.partial = path.with_name(path.name + ".partial")
        self._busy = Busy()

    def clear(self) -> None:
        """Delete the rows of an earlier incomplete run."""
        self.partial.unlink(missing_ok=True)

    def rows(self) -> list[Row]:
        """Return the rows of the run in progress."""
        return read(self.partial) if self.partial.exists() else []

    def measured(self) -> set[tuple[str, ...]]:
        """Return the keys of the rows measured at this commit."""
        commit = environment()["commit"]
        return {tuple(r[k] for k in self.key) for r in self.rows() if r["commit"] == commit}

    def append(self, rows: list[Row]) -> None:
        """Write rows, each with the environment and the load of other processes since the previous rows."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows = [{"time": now, **environment(), "others": self._busy.others(), **row} for row in rows]
        self._busy = Busy()
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        new = not self.partial.exists()
        with self.partial.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows({k: _text(v) for k, v in row.items()} for row in rows)

    def finish(self) -> None:
        """Rename the complete file to its final name."""
        if self.partial.exists():
            self.partial.replace(self.path)


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """Return a CSV file's rows, all values text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def select(rows: list[Row], **values: object) -> Iterator[Row]:
    """Yield the rows that have these values."""
    texts = {k: str(v) for k, v in values.items()}
    return (r for r in rows if all(r[k] == v for k, v in texts.items()))
