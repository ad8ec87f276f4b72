"""Find, read, write and sum the values of a program."""

import triton
import triton.language as tl

# Arguments of kernels that do not cause another compilation when their values change.
SIZES = (
    "values", "lines", "width", "positions", "magic", "bits", "channels", "rows", "stride_statistic", "stride_affine",
    "per", "splits", "part_rows", "blocks",
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
def channels_of(block, channels, positions, ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return the channels of a block's columns, and a mask of those that exist."""
    channel = block
    if GROUP > 0:
        channel = block * GROUP + tl.arange(0, B1)[None, :] // positions
        valid = tl.arange(0, B1)[None, :] < GROUP * positions
    else:
        if ROWS:
            channel = block * B1 + tl.arange(0, B1)[None, :]
        valid = channel < channels
    return channel, valid


@triton.jit
def results_of(block, channels, channel, valid, GROUP: tl.constexpr):
    """Return the channels of a block's sums, and a mask of those that exist."""
    if GROUP > 0:
        channel = block * GROUP + tl.arange(0, GROUP)[:, None]
        valid = channel < channels
    return channel, valid


@triton.jit
def columns_of(
    block, channels, positions, width, magic, bits,
    ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return where a block's values are, as `offsets` needs it, and a mask of the columns that exist.

    Sizes are multiples of VEC. With this hint, the compiler generates accesses of VEC values. Offsets have 64 bits with
    `WIDE`. Otherwise, they have 32 bits, which takes half the registers.
    """
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    j = tl.arange(0, B1)[None, :]
    if GROUP > 0:
        size = GROUP * positions // VEC * VEC
        stride = channels.to(integer) * positions // VEC * VEC
        column = block.to(integer) * size + j
        there = j < size
    elif ROWS:
        stride = channels.to(integer) // VEC * VEC
        column = block * B1 + j
        there = column < stride
    else:
        stride = (channels - 1).to(integer) * width  # lines between the last of a sample and the first of the next
        column = block.to(integer) * width * VEC + j
        there = block < channels
    return (column, stride, magic, bits), there


@triton.jit
def samples_of(k, place):
    """Return the sample of each line: k // width, by a multiplication (Granlund and Montgomery, 1994)."""
    _column, _stride, magic, bits = place
    return tl.umulhi(k << 2, magic) >> bits


@triton.jit
def offsets(k, place, ROWS: tl.constexpr, VEC: tl.constexpr):
    """Return the offsets of the lines k `[B0, 1]`."""
    column, stride, _magic, _bits = place
    return k * stride + column if ROWS else (k + samples_of(k, place) * stride) * VEC + column


@triton.jit
def span(split, per, lines, STEP: tl.constexpr, WIDE: tl.constexpr):
    """Return the split's first line, the end of its steps of STEP lines without a mask, and the end of its lines."""
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    begin = split.to(integer) * per
    end = tl.minimum(begin + per, lines.to(integer))
    return begin, begin + (end - begin) // STEP * STEP, end


@triton.constexpr_function
def half(ahead):
    """Return the tiles that a kernel of two tensors, loaded or stored, has in flight instead of `ahead`."""
    return (ahead + 1) // 2


@triton.jit
def masked(there, k, end, MASKED: tl.constexpr):
    """Return the mask of lines k: `there`, and at the end of a split, only the lines before `end`."""
    if MASKED:
        there = there & (k < end)
    return there


@triton.jit
def whole_block(
    block, lines, channels, positions,
    ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return the offsets and the mask of the one tile that holds a block."""
    integer: tl.constexpr = tl.int64 if WIDE else tl.int32
    k = tl.arange(0, B0)[:, None].to(integer)
    if ROWS:
        place, there = columns_of(block, channels, positions, 1, 1, 0, ROWS, GROUP, B1, VEC, WIDE)
        offset = offsets(k, place, ROWS, VEC)
    else:
        size = positions // VEC * VEC
        column = tl.arange(0, B1)[None, :]
        there = column < size
        offset = (k * channels + block) * size + column
    return offset, there & (k < lines)


@triton.jit
def total(t, AXIS: tl.constexpr):
    """Return the sum of a tile along an axis, or of the whole tile (None)."""
    return tl.sum(t, AXIS, keep_dims=AXIS is not None)


@triton.jit
def product(a, b):
    """Return a·b for a sum over a tile.

    The compiler would fuse a plain product with the first addition between threads. Threads that hold the same sum
    would then differ in its last bit, and which of them is stored would be undefined.
    """
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def largest(t, AXIS: tl.constexpr):
    """Return the maximum of a tile along an axis, or of the whole tile (None)."""
    return tl.max(t, AXIS, keep_dims=AXIS is not None)


@triton.jit
def by_channel(t, positions, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return columns `[1, B1]` as `[GROUP, B1]`, and a mask of those that belong to the channel."""
    owner = tl.arange(0, B1)[None, :] // positions
    return tl.broadcast_to(t, [GROUP, B1]), owner == tl.arange(0, GROUP)[:, None]


@triton.jit
def sum_positions(t, positions, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return the sum over the columns of each channel, if several columns belong to one."""
    if GROUP > 0:
        values, there = by_channel(t, positions, GROUP, B1)
        t = total(tl.where(there, values, 0.0), 1)
    return t


@triton.jit
def total_everywhere(t, positions, ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return the sum of a tile for each channel, in every column of the channel."""
    t = total(t, 0 if ROWS else None)
    if GROUP > 0:
        _, there = by_channel(t, positions, GROUP, B1)
        t = total(tl.where(there, sum_positions(t, positions, GROUP, B1), 0.0), 0)
    return t


@triton.jit
def first_columns(valid, positions, GROUP: tl.constexpr, B1: tl.constexpr):
    """Return the mask of one column for each channel."""
    if GROUP > 0:
        valid = valid & (tl.arange(0, B1)[None, :] % positions == 0)
    return valid


@triton.jit
def load(ptr, offset, mask, LAST: tl.constexpr):
    """Return a tile in float32, undefined outside the mask; with `LAST`, no later kernel of the pass reads it."""
    return tl.load(ptr + offset, mask, eviction_policy="evict_first" if LAST else "").to(tl.float32)


@triton.jit
def store(ptr, offset, values, mask):
    """Write a tile in the tensor's dtype, or nothing if there is no tensor."""
    if ptr is not None:
        tl.store(ptr + offset, values.to(ptr.dtype.element_ty), mask)


@triton.jit
def load_weights(ptr, k, positions, mask, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr):
    """Return the weights of the values of lines k, zero outside the mask."""
    j = tl.arange(0, B1)[None, :]
    if GROUP > 0:
        at = k * positions + j % positions
    elif ROWS:
        at = k
    else:
        at = k * B1 + j
    return tl.load(ptr + tl.broadcast_to(at, [B0, B1]), mask, 0.0)


@triton.jit
def group_of_splits(start, splits, index_ptr, group, B0: tl.constexpr):
    """Return B0 splits from `start` on, and a mask of those that exist and, with an index, belong to the group."""
    split = start + tl.arange(0, B0)[:, None]
    there = split < splits
    if index_ptr is not None:
        there = there & (tl.load(index_ptr + split, there, -1) == group)
    return split, there
