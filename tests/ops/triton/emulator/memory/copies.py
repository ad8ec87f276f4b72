"""Asynchronous copies from global to shared memory (`cp.async`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ops.triton.emulator.lanes import Array
from tests.ops.triton.emulator.memory.bytes import Memory
from tests.ops.triton.emulator.memory.order import Order


@dataclass(frozen=True)
class _Copy:
    """Copies that one instruction started and that have not arrived: one row a thread."""

    group: Array
    lanes: Array
    warps: Array
    at: Array
    values: Array
    granules: Array

    def rows(self, chosen: Array) -> _Copy:
        return _Copy(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


class Copies:
    """The copies that are on their way to shared memory. Each thread counts the groups that it has committed."""

    def __init__(self, shared: Memory, lanes: int) -> None:
        self._shared, self._committed, self._copies = shared, np.zeros(lanes, np.int64), list[_Copy]()

    def start(self, at: Array, values: Array, lanes: Array, warps: Array, order: Order) -> None:
        """Start copies of rows of values. Until they are waited for, nobody may access their destination."""
        granules = self._shared.check_write(at, values.shape[1] * values.itemsize, warps, order)
        assert self._shared.arriving is not None
        self._shared.arriving[granules] = True
        self._copies.append(_Copy(self._committed[lanes] + 1, lanes, warps, at, values, granules))

    def commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def wait(self, lanes: Array, unfinished: int, order: Order) -> None:
        """Finish the groups that these threads have committed, except the last `unfinished`."""
        waits = np.zeros(len(self._committed), np.bool_)
        waits[lanes] = True
        left = []
        for copy in self._copies:
            done = waits[copy.lanes] & (copy.group <= self._committed[copy.lanes] - unfinished)
            if done.any():
                self._finish(copy.rows(done), order)
            if not done.all():
                left.append(copy.rows(~done))
        self._copies = left

    def _finish(self, copy: _Copy, order: Order) -> None:
        assert self._shared.arriving is not None
        self._shared.arriving[copy.granules] = False
        self._shared.store(copy.at, copy.values)
        self._shared.record_write(copy.granules, copy.warps, order)
