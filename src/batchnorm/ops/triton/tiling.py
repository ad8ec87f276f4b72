"""The division of a tensor into tiles and programs, which follows from its sizes and a table.

Nothing is timed while a network trains, because another choice would sum in another order and change the results.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from batchnorm.ops.triton.settings import Settings
from batchnorm.ops.triton.table import TABLE

# Merging reads few values: tiles of [splits, channels].
MERGE_SPLITS, MERGE_CHANNELS = 256, 8

# For fewer values, a second launch costs more time than reading x twice, however few programs there are.
_SMALL = 1 << 18
# For at least this size, offsets have 64 bits. It is half the range of 32 bits, because tiles can exceed the tensor.
_WIDE = 1 << 30
# The most bytes that one instruction loads.
_ACCESS = 16
# The most warps of a program. 32 would not overlap loads with stores, and exceed 1,024 threads with 64 lanes (AMD).
_WARPS = 16
# The most registers of a thread if coefficients are vectors, so that a multiprocessor runs three programs of 8 warps.
_REGISTERS = 80
# The values that a line of several channels has at least, if it can: one access of a warp.
_LINE = 256
# The smallest part of a row: one memory sector.
_SECTOR = 32


@dataclass(frozen=True)
class Tiling:
    """Arguments of launches, with the kernels' names. The grid is `blocks * splits`.

    `launches` holds the launches that have been prepared for this tiling.
    """

    rows: bool
    group: int
    lines: int
    width: int
    positions: int
    channels: int
    values: int
    b0: int
    b1: int
    vec: int
    warps: int
    registers: int | None
    ahead: int | None
    blocks: int
    splits: int
    per: int
    launches: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def grid(self) -> tuple[int]:
        """Return the number of programs.

        Raises:
            ValueError: there are too many for a grid; this needs an index and 2³¹ pairs of a sample and a channel.
        """
        programs = self.blocks * self.splits
        if programs >= 1 << 31:
            raise ValueError(
                f"batchnorm's kernels expect fewer than 2**31 pairs of a sample and a channel if samples differ in "
                f"their statistics, got {programs}. Split the batch, or set BATCHNORM_GPU_KERNELS=eager."
            )
        return (programs,)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Return the lines, the lines of a sample, the positions, and two numbers that divide by the lines of a sample.

        `4k * magic >> 32 >> bits` is `k // width` for k < 2³⁰, and with 64 bits, for k < 2⁶².
        """
        bits = (self.width - 1).bit_length()
        magic = -(-(1 << (62 if self._wide else 30) + bits) // self.width)
        return self.lines, self.width, self.positions, magic, bits

    @property
    def _wide(self) -> bool:
        return self.values >= _WIDE

    @property
    def merge_blocks(self) -> int:
        """Return the number of blocks of channels in a merge of splits."""
        return -(-self.channels // MERGE_CHANNELS)

    @property
    def constants(self) -> dict[str, int | bool]:
        """Return the compile-time arguments of a kernel."""
        found = {
            "ROWS": self.rows, "GROUP": self.group, "B0": self.b0, "B1": self.b1, "VEC": self.vec, "WIDE": self._wide,
            "num_warps": self.warps,
        }  # fmt: skip
        if self.ahead is not None:
            found["AHEAD"] = self.ahead
        if self.registers is not None:
            found["maxnreg"] = self.registers
        return found


def forget() -> None:
    """Forget all tilings, and their launches."""
    streamed.cache_clear()
    at_once.cache_clear()


@functools.cache
def merged_rows(splits: int, fan: int) -> int:
    """Return the number of partial results of a block if programs merge up to `fan` of them, in several levels."""
    rows, level = 0, splits
    while level > 1:
        rows, level = rows + level, -(-level // fan)
    return rows


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def _vec(itemsize: int, *sizes: int) -> int:
    """Return the number of values of the widest access that divides all sizes."""
    return math.gcd(_ACCESS // itemsize, *sizes)


def _group(c: int, s: int, itemsize: int, tile: int) -> int:
    """Return the number of neighboring channels that share a line, or 0 if that widens accesses less than four times.

    The widest access of a sample divides the size of this number of channels.
    """
    vec = _vec(itemsize, c * s)
    group = vec // math.gcd(vec, s)
    if group <= 2 or power_of_two(group * s) > tile:
        return 0
    while 2 * group * s <= _LINE and c % (2 * group) == 0:
        group *= 2
    return group


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; a small number on the CPU, where the interpreter runs."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def settings_of(s: int, channels_last: bool, itemsize: int) -> Settings:
    """Return the settings of x's class, which depends on the memory layout and the dtype's size."""
    return TABLE[channels_last or s == 1, itemsize]


@functools.lru_cache(maxsize=4096)
def streamed(
    n: int,
    c: int,
    s: int,
    channels_last: bool,
    itemsize: int,
    indexed: bool,
    by_sample: bool,
    processors: int,
    settings: Settings,
) -> Tiling:
    """Return the tiling for programs that loop over tiles of x `[n, c, s]`.

    Args:
        n: Samples.
        c: Channels.
        s: Positions.
        channels_last: Whether channels are innermost.
        itemsize: Bytes of a value.
        indexed: Whether samples may use different rows of the statistics.
        by_sample: Whether every sample is a separate split.
        processors: Multiprocessors to fill.
        settings: The settings of the tensor's class.
    """
    rows, group, values = channels_last or s == 1, 0, n * c * s
    if c == 1 and not indexed:  # its values are contiguous
        rows, n, s = False, 1, n * s
    if not rows and not indexed:
        group = _group(c, s, itemsize, settings.tile)
    if group:
        vec, rows, lines, width = _vec(itemsize, c * s), True, n, 1
        b1, blocks = power_of_two(group * s), -(-c // group)
    elif rows:
        vec, lines, width = _vec(itemsize, c), n * s, s
        b1 = min(power_of_two(c), max(settings.row_bytes // itemsize, 1))
        blocks = -(-c // b1)
    else:
        vec = b1 = _vec(itemsize, s)
        lines, width, blocks = n * s // vec, s // vec, c
    b0 = max(settings.tile // b1, 1)
    ahead, warps, registers = settings.ahead, settings.warps, _REGISTERS if rows and not torch.version.hip else None
    if by_sample:
        b0 = min(b0, power_of_two(width))
        if rows:
            b1 = min(settings.tile // b0, power_of_two(c))
            blocks = -(-c // b1)
        splits, per = n, width
        warps = max(1, min(warps, b0 * b1 // 256))
    else:
        if indexed:  # tiles have `[K, C]` vectors, which take too many registers
            ahead, registers = 1, None
        units = -(-lines // (b0 * ahead))
        wanted = max(-(-settings.programs * processors // blocks), -(-units * ahead // settings.deepest))
        each = -(-units // min(wanted, units))
        splits, per = -(-units // each), each * b0 * ahead
    return Tiling(rows, group, lines, width, s, c, values, b0, b1, vec, warps, registers, ahead, blocks, splits, per)


@functools.lru_cache(maxsize=4096)
def at_once(
    n: int,
    c: int,
    s: int,
    channels_last: bool,
    itemsize: int,
    tensors: int,
    processors: int,
    settings: Settings,
) -> Tiling | None:
    """Return the tiling for one program per block, which holds all the block's values of `tensors` tensors.

    Return None if they do not fit. Also return None if most of the device would be idle, unless the tensor is too small
    for that to matter.
    """
    rows, group, values = (channels_last or s == 1) and c > 1, 0, n * c * s
    limit = settings.once // tensors
    if rows:
        limit //= 2  # coefficients are vectors here, which also take registers
        vec, lines = _vec(itemsize, c), n * s
        b0 = power_of_two(lines)
        narrowest = min(_SECTOR // itemsize, power_of_two(c))
        if b0 * narrowest > limit:
            return None
        b1 = min(limit // b0, settings.row_bytes // itemsize, power_of_two(c))
        while -(-c // b1) < processors and b1 > narrowest:
            b1 //= 2
        blocks = -(-c // b1)
    else:
        if c == 1:
            n, s = 1, n * s
        vec, lines, blocks = _vec(itemsize, s), n, c
        b0, b1 = power_of_two(n), power_of_two(s)
        group = _group(c, s, itemsize, settings.tile)
    if group and b0 * b1 * group > limit // 2 and values <= _SMALL:
        group = 0
    if group:
        rows, vec, blocks, b1, limit = True, _vec(itemsize, c * s), c // group, b1 * group, limit // 2
    if b0 * b1 > limit or (2 * blocks < processors and values > _SMALL):
        return None
    per_warp = 512 if vec == 1 else 1024  # without wide accesses, each value needs its own offset
    warps = min(max(power_of_two(b0 * b1 // per_warp), 4), _WARPS)
    return Tiling(rows, group, lines, s, s, c, values, b0, b1, vec, warps, None, None, blocks, 1, lines)
