"""The load that other processes put on the machine during a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Busy:
    """A period that starts when the object is created."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return wall-clock seconds, CPU seconds of this process, and busy CPU seconds of the whole machine."""
        own = sum(os.times()[:4])
        try:
            first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return time.monotonic(), own, float("nan")
        user, nice, system, _idle, _waiting, irq, soft, steal = map(int, first[1:9])
        ticks = user + nice + system + irq + soft + steal
        return time.monotonic(), own, ticks / os.sysconf("SC_CLK_TCK")

    def others(self) -> float:
        """Return the share of the machine that other processes used since the start; NaN if unknown."""
        wall, own, everyone = (now - then for now, then in zip(self._now(), self._begin, strict=True))
        return max(0.0, everyone - own) / max(wall * (os.cpu_count() or 1), 1e-9)
