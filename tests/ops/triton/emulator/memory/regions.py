"""The address space of a launch: one region for each argument, far from all others.

Two tensors are never neighbours here, so that an access past the end of one never reaches the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.ops.triton.emulator.faults import Fault
from tests.ops.triton.emulator.lanes import Array
from tests.ops.triton.emulator.memory.bytes import Memory

_REGION = 44  # bits of an address within a region; offsets of 32 bits never leave it
_ALIGNMENT = 256  # of the first byte of memory, at most


@dataclass(frozen=True)
class Region:
    """The bytes of one argument.

    Args:
        name: The argument's name.
        memory: The memory that contains it, which other arguments may share.
        start: The argument's first byte in `memory`.
        size: Its bytes.
    """

    name: str
    memory: Memory
    start: int
    size: int


class Regions:
    """The regions of a launch."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._addresses: list[int] = []

    def add(self, region: Region) -> int:
        """Return the address of the region's first byte."""
        self._regions.append(region)
        first = (len(self._regions) << _REGION) + region.start % _ALIGNMENT
        self._addresses.append(first)
        return first

    def find(self, addresses: Array, size: int) -> Iterator[tuple[Region, Array, Array]]:
        """Yield each region that is accessed, which accesses these are, and their offsets in its memory."""
        if (addresses % np.uint64(size)).any():
            address = int(addresses[addresses % np.uint64(size) != 0][0])
            raise Fault(f"accesses {size} bytes at the misaligned address {self._describe(address)}")
        numbers = addresses >> np.uint64(_REGION)
        for number in np.unique(numbers):
            if not 0 < number <= len(self._regions):
                address = int(addresses[numbers == number][0])
                raise Fault(f"accesses {size} bytes at {self._describe(address)}, out of bounds")
            region, first = self._regions[int(number) - 1], self._addresses[int(number) - 1]
            chosen = np.flatnonzero(numbers == number)
            offsets = addresses[chosen].astype(np.int64) - first
            outside = (offsets < 0) | (offsets + size > region.size)
            if outside.any():
                address = int(addresses[chosen[outside]][0])
                raise Fault(f"accesses {size} bytes at {self._describe(address)}, out of bounds")
            yield region, chosen, offsets + region.start

    def end_launch(self) -> None:
        """Forget what no later launch can race with."""
        for region in self._regions:
            region.memory.end_launch()

    def _describe(self, address: int) -> str:
        """Return an address relative to the nearest argument."""
        if not self._regions:
            return f"{address:#x}"
        distances = [
            max(first - address, address - (first + region.size - 1), 0)
            for region, first in zip(self._regions, self._addresses, strict=True)
        ]
        nearest = int(np.argmin(distances))
        region, first = self._regions[nearest], self._addresses[nearest]
        if distances[nearest] > 1 << (_REGION - 1):
            return f"{address:#x}, which is near no argument"
        return f"byte {address - first} of {region.name}, which has {region.size} bytes"
