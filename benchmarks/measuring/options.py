"""The options of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Settings that every section reads.

    Args:
        out: Directory of the results.
        quick: Whether only to test that everything runs.
        seconds: Time for all contenders of a case.
        threads: Number of threads that torch uses.
        only: Only the cases whose description contains this text.
        allocator: The name of the allocator setting of this process.
    """

    out: Path
    quick: bool
    seconds: float
    threads: int
    only: str
    allocator: str
