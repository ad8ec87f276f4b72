"""What a run was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Settings that every section reads.

    Args:
        out: Directory of the results.
        quick: Whether only to see that everything runs.
        seconds: For all contenders of a case together.
        rounds: Alternations of a training step of a network.
        threads: That torch computes with.
        only: Of single layers, those cases whose description contains this.
        allocator: The name of the setting that this process runs in.
    """

    out: Path
    quick: bool
    seconds: float
    rounds: int
    threads: int
    only: str
    allocator: str
