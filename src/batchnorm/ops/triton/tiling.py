"""The division of a tensor into tiles and programs, which follows from its sizes and a table.

Nothing is timed while a network trains, because another choice would sum in another order and change the results.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from batchnorm.ops.triton.settings import Settings
from batchnorm.ops.triton.table import TABLE

# Merging reads few values: tiles of [splits, channels].
MERGE_SPLITS, MERGE_CHANNELS = 256, 8

# For fewer values, a second launch costs more time than reading x twice, however few programs there are.
_SMALL = 1 << 18
# For at least this size, offsets have 64 bits. It is half the range of 32 bits, because tiles can exceed the tensor.
_WIDE = 1 << 30
# The shared memory that every device since Ampere has for a program. At most four tensors are loaded ahead into it.
_SHARED, _TENSORS = 96 << 10, 4
# The most warps of a program. 32 would not overlap loads with stores, and exceed 1,024 threads with 64 lanes (AMD).
_WARPS = 16
# The smallest part of a row: one memory sector.
_SECTOR = 32


@dataclass(frozen=True)
class Tiling:
    """Arguments of a launch, with the kernels' names. The grid is `blocks * splits`."""

    rows: bool
    size0: int
    size1: int
    stride0: int
    channels: int
    positions: int
    b0: int
    b1: int
    vec: int
    warps: int
    stages: int | None
    blocks: int
    splits: int
    per: int

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
    def shape(self) -> tuple[int, int, int]:
        """Return the sizes of both axes, and the stride of the first."""
        return self.size0, self.size1, self.stride0

    @property
    def merge_blocks(self) -> int:
        """Return the number of blocks of channels in a merge of splits."""
        return -(-self.channels // MERGE_CHANNELS)

    @property
    def constants(self) -> dict[str, int | bool]:
        """Return the compile-time arguments of a kernel."""
        wide = self.channels * self.size0 * (1 if self.rows else self.size1) >= _WIDE
        found = {
            "ROWS": self.rows, "B0": self.b0, "B1": self.b1, "VEC": self.vec, "WIDE": wide, "num_warps": self.warps,
        }  # fmt: skip
        return found if self.stages is None else found | {"STAGES": self.stages}


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def _vec(*sizes: int) -> int:
    """Return the largest of 8, 4, 2, 1 that divides all sizes."""
    return next(v for v in (8, 4, 2, 1) if all(size % v == 0 for size in sizes))


def _widths(size: int) -> int:
    """Return B1 for `size` positions: the largest with at most a tenth more padding than the best."""
    padded = {b: -(-size // b) * b for b in (1024, 512, 256, 128, 64, 32)}
    least = min(padded.values())
    return min(next(b for b, n in padded.items() if n <= 1.1 * least), power_of_two(size))


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
    rows = channels_last or s == 1
    if c == 1 and not indexed:  # its values are contiguous
        rows, n, s = False, 1, n * s
    if rows:
        size0, size1, stride0 = n * s, c, c
        b1 = min(power_of_two(c), max(settings.row_bytes // itemsize, 1))
        blocks = -(-c // b1)
    else:
        size0, size1, stride0 = n, s, c * s
        b1, blocks = _widths(s), c
    b0 = max(settings.tile // b1, 1)
    if by_sample:
        if rows:
            b0 = min(b0, power_of_two(s))
            b1 = min(settings.tile // b0, power_of_two(c))
            blocks = -(-c // b1)
        else:
            b0 = 1
        splits, per = n, (s if rows else -(-s // b1))
        warps = max(1, min(settings.warps, b0 * b1 // 256))
    else:
        tiles = -(-size0 // b0) * (1 if rows else -(-size1 // b1))
        wanted = max(-(-settings.programs * processors // blocks), -(-tiles // settings.deepest))
        each = -(-tiles // min(wanted, tiles))
        splits, per = -(-tiles // each), (each * b0 if rows else each)
        warps = settings.warps
    ahead = 0 if indexed else _SHARED // (_TENSORS * b0 * b1 * itemsize)  # [K, C] vectors would take too much of it
    stages = min(settings.stages, 1 + ahead)
    vec = _vec(size1, stride0)
    return Tiling(rows, size0, size1, stride0, c, s, b0, b1, vec, warps, stages, blocks, splits, per)


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
    rows = (channels_last or s == 1) and c > 1
    limit = settings.once // tensors
    if rows:
        limit //= 2  # coefficients are vectors here, which also take registers
        size0, size1, stride0 = n * s, c, c
        b0 = power_of_two(size0)
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
        size0, size1, stride0 = n, s, c * s
        b0, b1, blocks = power_of_two(n), power_of_two(s), c
    if b0 * b1 > limit or (2 * blocks < processors and n * c * s > _SMALL):
        return None
    vec = _vec(size1, stride0)
    per_warp = 512 if vec == 1 else 1024  # without wide accesses, each value needs its own offset
    warps = min(max(power_of_two(b0 * b1 // per_warp), 4), _WARPS)
    return Tiling(rows, size0, size1, stride0, c, s, b0, b1, vec, warps, None, blocks, 1, size0)
