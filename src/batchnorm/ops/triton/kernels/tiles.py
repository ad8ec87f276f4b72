"""Where a program's values are, and sums over them."""

import triton
import triton.language as tl


@triton.jit
def program(blocks, REVERSED: tl.constexpr):
    """Block of channels and split of this program, on the one axis of the grid that may be longer than 65,535.

    Reversed, what an earlier kernel read last comes first: it may still be in the cache.
    """
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    return pid % blocks, pid // blocks


@triton.jit
def channels_of(block, channels, ROWS: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr):
    """The block's channels, and which of them there are."""
    channel = block
    if ROWS:
        channel = block * B1 + tl.arange(0, B1)[None, :]
        channels = channels // VEC * VEC
    return channel, channel < channels


@triton.jit
def span(split, per, size0, size1, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, WIDE: tl.constexpr):
    """Where the split begins (a row, or a tile), where axis 0 ends for it, and its number of tiles.

    In 64 bits where `WIDE`, and with them every place and offset of `tile`; else in 32, in half the registers.
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
    begin,
    end,
    t,
    block,
    size1,
    stride0,
    ROWS: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    VEC: tl.constexpr,
):
    """Places on axis 0 and axis 1, offsets and mask of the split's tile t.

    Sizes along axis 1 are multiples of VEC; said here, it makes one access of VEC values.
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
    """Sum of a tile for each channel."""
    return tl.sum(t, 0, keep_dims=True) if ROWS else tl.sum(tl.sum(t, 1), 0)


@triton.jit
def largest(t, ROWS: tl.constexpr):
    """Maximum of a tile for each channel."""
    return tl.max(t, 0, keep_dims=True) if ROWS else tl.max(tl.max(t, 1), 0)
