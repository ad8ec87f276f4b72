"""Find, read, write and sum the values of a program."""

import triton
import triton.language as tl

# Arguments of kernels that do not cause another compilation when their values change.
SIZES = (
    "values", "size0", "size1", "stride0", "channels", "positions", "rows", "stride_statistic", "stride_affine", "per",
    "splits", "blocks",
)  # fmt: skip


@triton.jit
def program(blocks, REVERSED: tl.constexpr):
    """Return this program's block of channels and its split, from the only grid axis that may exceed 65,535.

    With `REVERSED`, a kernel starts with the values that the previous kernel read last and that may still be in cache.
    """
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    return pid % blocks, pid // blocks


@triton.jit
def channels_of(block, channels, ROWS: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr):
    """Return the block's channels, and a mask of those that exist."""
    channel = block
    if ROWS:
        channel = block * B1 + tl.arange(0, B1)[None, :]
        channels = channels // VEC * VEC
    return channel, channel < channels


@triton.jit
def span(split, per, size0, size1, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, WIDE: tl.constexpr):
    """Return the split's start (a row or a tile), its end on axis 0, and its number of tiles.

    These values and all offsets in `tile` have 64 bits with `WIDE`. Otherwise, they have 32 bits, which takes half the
    registers.
    """
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    begin = split.to(integer) * per
    end = size0.to(integer)
    if ROWS:
        end = tl.minimum(begin + per, end)
        tiles = tl.cdiv(end - begin, B0)
    else:
        tiles = tl.minimum(tl.cdiv(end, B0) * tl.cdiv(size1, B1) - begin, per)
    return begin, end, tiles


@triton.jit
def tile(
    begin, end, t, block, size1, stride0, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr
):
    """Return the positions on axis 0 and axis 1, the offsets and the mask of the split's tile t.

    Sizes along axis 1 are multiples of VEC. With this hint, the compiler generates accesses of VEC values.
    """
    size1 = size1 // VEC * VEC
    stride0 = stride0 // VEC * VEC
    i = tl.arange(0, B0)[:, None]
    j = tl.arange(0, B1)[None, :]
    if ROWS:
        i = begin + t * B0 + i
        j = block * B1 + j
        offset = i * stride0 + j
    else:
        across = tl.cdiv(size1, B1)
        at = begin + t
        i = at // across * B0 + i
        j = at % across * B1 + j
        offset = block.to(at.dtype) * size1 + i * stride0 + j
    return i, j, offset, (i < end) & (j < size1)


@triton.jit
def total(t, ROWS: tl.constexpr):
    """Return the sum of a tile for each channel."""
    return tl.sum(t, 0, keep_dims=True) if ROWS else tl.sum(t)


@triton.jit
def product(a, b):
    """Return a·b for a sum over a tile.

    The compiler would fuse a plain product with the first addition between threads. Threads that hold the same sum
    would then differ in its last bit, and which of them is stored would be undefined.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def largest(t, ROWS: tl.constexpr):
    """Return the maximum of a tile for each channel."""
    return tl.max(t, 0, keep_dims=True) if ROWS else tl.max(t)


@triton.jit
def load(ptr, offset, mask):
    """Return a tile in float32, zero outside the mask."""
    return tl.load(ptr + offset, mask, 0.0).to(tl.float32)


@triton.jit
def store(ptr, offset, values, mask):
    """Write a tile in the tensor's dtype, or nothing if there is no tensor."""
    if ptr is not None:
        tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask)


@triton.jit
def load_weights(ptr, i, j, size1, mask, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """Return the weights of a tile's values."""
    place = i if ROWS else i * size1 + j
    return tl.load(ptr + tl.broadcast_to(place, [B0, B1]), mask, 0.0)


@triton.jit
def load_rows(index_ptr, i, end, positions, rows, valid, ROWS: tl.constexpr):
    """Return the statistics' row for each sample of a tile, and a mask of its existing channels."""
    row = tl.load(index_ptr + (i // positions if ROWS else i), i < end, 0)
    return row, valid & (row >= 0) & (row < rows)


@triton.jit
def group_of_splits(start, splits, index_ptr, group, B0: tl.constexpr):
    """Return B0 splits from `start` on, and a mask of those that exist and, with an index, belong to the group."""
    split = start + tl.arange(0, B0)[:, None]
    there = split < splits
    if index_ptr is not None:
        there = there & (tl.load(index_ptr + split, there, -1) == group)
    return split, there
