"""The order of a launch's accesses: by a warp's own sequence, barriers, atomics and fences.

Every program has a clock that advances at barriers and releases. An access leaves a stamp: its launch, its program's
clock, and its warp. An earlier access happens before a warp's next one if it is older than this launch, by the same
warp, by the same program before the last barrier, or known from another program by an acquire, as in the memory model
of PTX. The order in which the emulator runs the programs does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tests.ops.triton.emulator.lanes import WARP, Array

_CLOCK, _LAUNCH = 24, 44  # the bits where a stamp's clock and launch start; its warp starts at 0
_SEVERAL_PROGRAMS = (1 << _CLOCK) - 1


class Order:
    """The order of accesses in a launch.

    Warps are numbered through all programs. The last number of each program stands for several of its warps.

    Args:
        launch: The launch's number. Stamps with another number are older.
        programs: The number of each program in the grid.
        threads: Threads of a program.
    """

    def __init__(self, launch: int, programs: Sequence[int], threads: int) -> None:
        self._launch, self._programs = launch, programs
        self._width = threads // WARP + 1
        self._clock = np.ones(len(programs), np.int64)
        self._barrier = np.ones(len(programs), np.int64)  # the clock at the last barrier
        self._known: dict[int, Array] = {}  # for each warp, the last clock of each other warp that happens before it
        self._published: dict[object, Array] = {}  # what a release left at an address
        self._fenced: dict[int, Array] = {}  # what a fence allows a warp's relaxed atomics to publish
        self._pending: dict[int, Array] = {}  # what relaxed atomics read, until a fence

    def warps_of(self, programs: Array) -> Array:
        """Return the number of the warp of each thread of these programs."""
        threads = np.arange((self._width - 1) * WARP) // WARP
        return (programs[:, None] * self._width + threads).ravel()

    def name(self, warp: int) -> str:
        if warp == _SEVERAL_PROGRAMS:
            return "several programs"
        program, own = divmod(int(warp), self._width)
        who = "several warps" if own == self._width - 1 else f"warp {own}"
        return f"{who} of program {self._programs[program]}"

    def stamps(self, warps: Array) -> Array:
        """Return the stamps that accesses by these warps leave now."""
        return self._launch << _LAUNCH | self._clock[warps // self._width] << _CLOCK | warps

    @staticmethod
    def warps_that_left(stamps: Array) -> Array:
        return stamps & _SEVERAL_PROGRAMS

    def several(self, stamps: Array, others: Array) -> Array:
        """Return the stamps of accesses of this launch by both, where neither happens before the other."""
        warps = self.warps_that_left(stamps)
        program = warps // self._width
        same = program == self.warps_that_left(others) // self._width
        both = np.where(same, (program + 1) * self._width - 1, _SEVERAL_PROGRAMS)
        return stamps - warps + both

    def ordered(self, stamps: Array, warps: Array) -> Array:
        """Return whether the accesses with these stamps happen before the next access of these warps."""
        result: Array = stamps >> _LAUNCH != self._launch
        if result.all():
            return result
        owner, warps = self.warps_that_left(stamps), np.broadcast_to(warps, stamps.shape)
        clock = stamps >> _CLOCK & ((1 << (_LAUNCH - _CLOCK)) - 1)
        mine = warps // self._width
        result |= owner == warps
        result |= (owner // self._width == mine) & (clock < self._barrier[mine])
        if self._known and not result.all():
            for warp in np.unique(warps):
                if warp in self._known:
                    at = ~result & (warps == warp) & (owner != _SEVERAL_PROGRAMS)
                    result[at] = self._known[warp][owner[at]] >= clock[at]
        return result

    def barrier(self, programs: Iterable[int]) -> None:
        """Order the accesses of all warps of these programs."""
        for program in programs:
            members = range(program * self._width, (program + 1) * self._width - 1)
            known = [self._known[warp] for warp in members if warp in self._known]
            if known:
                self._known.update(dict.fromkeys(members, np.maximum.reduce(known)))
            self._clock[program] += 1
            self._barrier[program] = self._clock[program]

    def _all_before(self, warp: int) -> Array:
        """Return the last clock of every warp that happens before this warp's next access."""
        program = warp // self._width
        before = self._known.get(warp, np.zeros(len(self._programs) * self._width, np.int64)).copy()
        before[program * self._width : (program + 1) * self._width] = self._barrier[program] - 1
        before[warp] = self._clock[program]
        self._clock[program] += 1
        return before

    def release(self, warp: int, address: object) -> None:
        self._publish(address, self._all_before(warp))

    def acquire(self, warp: int, address: object) -> None:
        _join(self._known, warp, self._published.get(address))

    def relaxed(self, warp: int, address: object) -> None:
        """Access an address by a relaxed atomic, which orders only together with fences."""
        _join(self._pending, warp, self._published.get(address))
        if warp in self._fenced:
            self._publish(address, self._fenced[warp])

    def fence(self, warp: int) -> None:
        _join(self._known, warp, self._pending.pop(warp, None))
        self._fenced[warp] = self._all_before(warp)

    def _publish(self, address: object, before: Array) -> None:
        old = self._published.get(address)
        self._published[address] = before if old is None else np.maximum(old, before)


def _join(knowledge: dict[int, Array], warp: int, more: Array | None) -> None:
    if more is not None:
        old = knowledge.get(warp)
        knowledge[warp] = more if old is None else np.maximum(old, more)
