"""Memory that reports accesses outside of it, misaligned accesses, uninitialized values and data races."""

from __future__ import annotations

import numpy as np

from tests.ops.triton.emulator.faults import Fault
from tests.ops.triton.emulator.lanes import Array
from tests.ops.triton.emulator.memory.order import Order


def _spread(at: Array, size: int, unit: int) -> Array:
    """Return the units that accesses of `size` bytes at these offsets touch, one row an access."""
    return (at // unit)[:, None] + np.arange(max(size // unit, 1))


class Memory:
    """Bytes, and for every granule of them its last accesses.

    Large arrays take memory only where they are used, because the operating system allocates pages of zeros late.

    Args:
        data: The bytes.
        granule: Bytes of the smallest access, which share one record.
        written: Which granules have been written; None if all have.
    """

    def __init__(self, data: Array, granule: int, written: Array | None = None) -> None:
        self._data, self._granule, self._written = data, granule, written
        self._writers: Array | None = None
        self._readers: Array | None = None
        self._strong: Array | None = None  # whether the last write was an atomic or similar, which never race
        self._reads: list[tuple[Array, Array]] = []  # not yet in _readers, because most memory is only read
        self.arriving: Array | None = None  # which granules an asynchronous copy may still write

    def _no_stamps(self) -> Array:
        return np.zeros(-(-len(self._data) // self._granule), np.int64)

    def bits(self, at: Array, size: int, width: int) -> Array:
        """Return the values of `width` bytes of accesses of `size` bytes, without any check."""
        whole = len(self._data) // width * width
        return self._data[:whole].view(f"u{width}")[_spread(at, size, width)]

    def read(self, at: Array, size: int, width: int, warps: Array, order: Order) -> Array:
        """Return `[accesses, size / width]` unsigned integers of `width` bytes."""
        granules = _spread(at, size, self._granule)
        self._check_read(granules, warps[:, None], order)
        self._reads.append((granules, order.stamps(warps)[:, None]))
        return self.bits(at, size, width)

    def _check_read(self, granules: Array, warps: Array, order: Order) -> None:
        if self.arriving is not None and self.arriving[granules].any():
            raise Fault("reads memory that an asynchronous copy may not have written yet")
        if self._written is not None and not self._written[granules].all():
            raise Fault("reads uninitialized memory")
        if self._writers is not None:
            self._check(self._writers[granules], warps, order, "reads", "wrote")

    def _check(self, stamps: Array, warps: Array, order: Order, doing: str, done: str) -> None:
        ordered = order.ordered(stamps, warps)
        if not ordered.all():
            at = tuple(np.argwhere(~ordered)[0])
            other, own = order.warps_that_left(stamps[at]), np.broadcast_to(warps, stamps.shape)[at]
            raise Fault(
                f"is a data race: {order.name(own)} {doing} what {order.name(other)} {done}, and nothing orders them"
            )

    def check_write(self, at: Array, size: int, warps: Array, order: Order, same: Array | None = None) -> Array:
        """Return the granules of these accesses, if the warps may write them.

        Writes that change nothing (`same`) may race with other writes: Triton stores what several warps hold in each.
        """
        granules = _spread(at, size, self._granule)
        if self.arriving is not None and self.arriving[granules].any():
            raise Fault("writes memory that an asynchronous copy may not have written yet")
        self._record_reads(order)
        if self._readers is not None:
            self._check(self._readers[granules], warps[:, None], order, "writes", "read")
        if self._writers is not None:
            changed = slice(None) if same is None else ~same
            self._check(self._writers[granules[changed]], warps[changed, None], order, "writes", "wrote")
        return granules

    def write(self, at: Array, values: Array, warps: Array, order: Order) -> None:
        """Write `[accesses, values]` unsigned integers."""
        size = values.shape[1] * values.itemsize
        same = (self.bits(at, size, values.itemsize) == values).all(1)
        granules = self.check_write(at, size, warps, order, same)
        self.store(at, values)
        if (self.bits(at, size, values.itemsize) != values).any():
            raise Fault("is a data race: two threads write different values to one address at once")
        self.record_write(granules, warps, order)

    def access_strongly(self, at: Array, size: int, warps: Array, order: Order) -> None:
        """Check and record accesses that may race with others of their kind: atomic, relaxed, acquire or release."""
        granules = _spread(at, size, self._granule)
        if self._written is not None and not self._written[granules].all():
            raise Fault("reads uninitialized memory")
        self._record_reads(order)
        if self._strong is None:
            self._strong = np.zeros(len(self._no_stamps()), np.bool_)
        for records, done in ((self._writers, "wrote"), (self._readers, "read")):
            if records is not None:
                weak = np.where(self._strong[granules] & (done == "wrote"), 0, records[granules])
                self._check(weak, warps[:, None], order, "accesses", done)
        self.record_write(granules, warps, order)
        self._strong[granules] = True

    def store(self, at: Array, values: Array) -> None:
        """Change the bytes, without any check."""
        whole = len(self._data) // values.itemsize * values.itemsize
        width = values.itemsize
        self._data[:whole].view(f"u{width}")[_spread(at, values.shape[1] * width, width)] = values

    def record_write(self, granules: Array, warps: Array, order: Order) -> None:
        """Record that these warps have written the granules."""
        if self._writers is None:
            self._writers = self._no_stamps()
        self._put(self._writers, granules, order.stamps(warps)[:, None], order)
        if self._strong is not None:
            self._strong[granules] = False
        if self._written is not None:
            self._written[granules] = True

    def _record_reads(self, order: Order) -> None:
        if self._reads and self._readers is None:
            self._readers = self._no_stamps()
        for granules, stamps in self._reads:
            assert self._readers is not None
            before = self._readers[granules]
            alone = order.ordered(before, order.warps_that_left(stamps))
            self._put(self._readers, granules, np.where(alone, stamps, order.several(stamps, before)), order)
        self._reads.clear()

    @staticmethod
    def _put(records: Array, granules: Array, stamps: Array, order: Order) -> None:
        """Store stamps; where several warps access a granule at once, store the stamp of several."""
        stamps = np.broadcast_to(stamps, granules.shape)
        records[granules] = stamps
        kept = records[granules]
        if (different := kept != stamps).any():
            records[granules[different]] = order.several(stamps[different], kept[different])

    def end_launch(self) -> None:
        """Forget what no later launch can race with."""
        self._reads.clear()
