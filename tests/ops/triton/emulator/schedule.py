"""Choose the threads that run next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ops.triton.emulator.lanes import Array, Lanes

_LANES = 4096  # at the same time
_TOGETHER, _STEPS = 4, 50  # programs at the same time and instructions in a row, in a random order


class Schedule:
    """The order of programs and threads: all together, or with a seed, a random order.

    In a random order, a random part of a few programs' warps runs for a random number of instructions, then another.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.together = seed is None
        self._random = np.random.default_rng(seed)

    def batches(self, programs: int, threads: int) -> Iterator[Array]:
        """Yield the places of the programs that run at the same time."""
        if self.together:
            size, places = max(_LANES // threads, 1), np.arange(programs)
        else:
            size, places = int(self._random.integers(1, _TOGETHER + 1)), self._random.permutation(programs)
        for start in range(0, programs, size):
            yield places[start : start + size]

    def choose(self, ready: Array, lanes: Lanes) -> tuple[Array, int]:
        """Return the threads that run next, and for how many instructions at most."""
        if self.together:
            return np.ones_like(ready), 1 << 62
        warps = np.unique(lanes.warps[ready])
        count = int(self._random.integers(1, len(warps) + 1))
        chosen = self._random.choice(warps, count, replace=False)
        return ready & np.isin(lanes.warps, chosen), int(self._random.geometric(1 / _STEPS))
