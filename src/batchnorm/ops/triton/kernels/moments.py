"""Compute the mean (as a pair) and the sum of squared deviations.

Each lane of a tile sums deviations from its own first value, its *pivot*, which is near the mean. The sums of the lanes
of all programs are merged by the formula of Chan, Golub and LeVeque.
"""

import triton
import triton.language as tl

from .finish import axis_of, is_last, members_of, neighbors, step_of
from .tiles import (
    SIZES,
    by_channel,
    channels_of,
    columns_of,
    group_of_splits,
    largest,
    load,
    load_weights,
    masked,
    offsets,
    product,
    program,
    results_of,
    span,
    total,
)


@triton.jit
def join(count, pivot, first, second, AXIS: tl.constexpr):
    """Merge lanes into count, mean, mean_low and m2. Each lane has Σw, a pivot, Σw·d and Σw·d², where d = x − pivot.

    The mean is computed in two steps, so that one pivot far from the mean costs no accuracy. A constant channel
    deviates by exactly zero.
    """
    own = first / tl.where(count > 0.0, count, 1.0)
    second -= first * own
    second = tl.where(second < 0.0, 0.0, second)
    n = total(count, AXIS)
    divisor = tl.where(n > 0.0, n, 1.0)
    near = largest(tl.where(count > 0.0, pivot, float("-inf")), AXIS)
    near = tl.where(n > 0.0, near, 0.0)
    mean = near + total(product(count, (pivot - near) + own), AXIS) / divisor
    deviation = (pivot - mean) + own
    mean_low = total(product(count, deviation), AXIS) / divisor
    deviation -= mean_low
    return n, mean, mean_low, total(second + count * deviation * deviation, AXIS)


@triton.jit
def rounded_pair(mean, mean_low, dtype: tl.constexpr):
    """Return the pair with its first part rounded to x's dtype, so that x − mean is exact near it."""
    high = (mean + mean_low).to(dtype).to(tl.float32)
    return high, (mean - high) + mean_low


@triton.jit
def store_moments(
    mean_ptr, mean_low_ptr, m2_ptr, at, valid, n, mean, mean_low, m2, dtype: tl.constexpr, VARIANCE: tl.constexpr
):
    """Write the results of an operator: the mean as a pair, and m2 or the biased variance."""
    mean, mean_low = rounded_pair(mean, mean_low, dtype)
    if VARIANCE:
        m2 = tl.div_rn(m2, tl.where(n > 0.0, n, 1.0))
    tl.store(mean_ptr + at, mean, valid)
    tl.store(mean_low_ptr + at, mean_low, valid)
    tl.store(m2_ptr + at, m2, valid)


@triton.jit
def join_positions(n, mean, mean_low, m2, positions, GROUP: tl.constexpr, B1: tl.constexpr):
    """Merge the columns of each channel."""
    n, there = by_channel(n, positions, GROUP, B1)
    mean, _ = by_channel(mean, positions, GROUP, B1)
    mean_low, _ = by_channel(mean_low, positions, GROUP, B1)
    m2, _ = by_channel(m2, positions, GROUP, B1)
    n = tl.where(there, n, 0.0)
    first = n * mean_low
    return join(n, mean, first, tl.where(there, m2, 0.0) + first * mean_low, 1)


@triton.jit
def add_deviations(
    x_ptr, k, end, place, there, pivot, first, second,
    MASKED: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, VEC: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Add AHEAD tiles to the sums. Their loads do not depend on one another, so that all are in flight together."""
    for u in tl.static_range(AHEAD):
        mask = masked(there, k + u * B0, end, MASKED)
        deviation = load(x_ptr, offsets(k + u * B0, place, ROWS, VEC), mask, False) - pivot
        if MASKED:
            deviation = tl.where(mask, deviation, 0.0)
        first += deviation
        second = tl.fma(deviation, deviation, second)
    return first, second


@triton.jit
def store_part(parts_ptr, row, rows, channels, channel, valid, n, mean, mean_low, m2):
    """Write moments to a row of `parts [4, rows, C]`."""
    stride = rows.to(tl.int64) * channels
    at = parts_ptr + row.to(tl.int64) * channels + channel
    tl.store(at, n, valid)
    tl.store(at + stride, mean, valid)
    tl.store(at + 2 * stride, mean_low, valid)
    tl.store(at + 3 * stride, m2, valid)


@triton.jit
def add_parts(parts_ptr, row, rows, channels, channel, there, count, pivot, first, second):
    """Add moments of `parts [4, rows, C]` to the sums that `join` merges, reading what other programs have written."""
    stride = rows.to(tl.int64) * channels
    at = parts_ptr + row.to(tl.int64) * channels + channel
    n = tl.load(at, there, 0.0, cache_modifier=".cg")
    there = there & (n > 0.0)
    mean = tl.load(at + stride, there, 0.0, cache_modifier=".cg")
    mean_low = tl.load(at + 2 * stride, there, 0.0, cache_modifier=".cg")
    m2 = tl.load(at + 3 * stride, there, 0.0, cache_modifier=".cg")
    pivot = tl.where(there & (count == 0.0), mean, pivot)
    deviation = tl.where(there, (mean - pivot) + mean_low, 0.0)
    return count + n, pivot, first + n * deviation, second + n * deviation * deviation + m2


@triton.jit
def merge_parts(
    parts_ptr, begin, members, rows, channels, channel, valid,
    ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Merge the moments of some rows of `parts`, from `begin` on."""
    axis: tl.constexpr = axis_of(ROWS, GROUP)
    row, there = members_of(begin, 0, members, ROWS, GROUP, B1)
    count = tl.zeros((row + channel).shape, tl.float32)
    pivot, first, second = count, count, count
    for start in range(0, members, step_of(ROWS, GROUP, B1)):
        row, there = members_of(begin, start, members, ROWS, GROUP, B1)
        count, pivot, first, second = add_parts(
            parts_ptr, row, rows, channels, channel, there & valid, count, pivot, first, second
        )
    return join(count, pivot, first, second, axis)


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr, weights_ptr, parts_ptr, counters_ptr, mean_ptr, mean_low_ptr, m2_ptr,
    lines, width, positions, magic, bits, channels, per, splits, rows, blocks,
    VARIANCE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the moments of a block. The last programs merge its splits, whose moments are in `parts [4, rows, C]`.

    Without counters, only write the moments of splits to `parts`, for another kernel that merges them.
    """
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    place, there = columns_of(block, channels, positions, width, magic, bits, ROWS, GROUP, B1, VEC, WIDE)
    begin, full, end = span(split, per, lines, B0 * AHEAD, WIDE)
    lane = tl.arange(0, B0)[:, None]
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    if weights_ptr is None:
        mask = masked(there, begin + lane, end, True)
        pivot = tl.where(mask, load(x_ptr, offsets(begin + lane, place, ROWS, VEC), mask, False), 0.0)
        for k in range(begin, full, B0 * AHEAD):
            first, second = add_deviations(
                x_ptr, k + lane, end, place, there, pivot, first, second, False, ROWS, B0, VEC, AHEAD
            )
        if full < end:
            first, second = add_deviations(
                x_ptr, full + lane, end, place, there, pivot, first, second, True, ROWS, B0, VEC, AHEAD
            )
        count = tl.broadcast_to(((end - begin - lane + (B0 - 1)) // B0).to(tl.float32), [B0, B1])
    else:
        count = tl.zeros([B0, B1], tl.float32)
        pivot = tl.zeros([B0, B1], tl.float32)
        for k in range(begin, end, B0):
            mask = masked(there, k + lane, end, True)
            x = load(x_ptr, offsets(k + lane, place, ROWS, VEC), mask, False)
            w = load_weights(weights_ptr, k + lane, positions, mask, ROWS, GROUP, B0, B1)
            counted = w != 0.0
            pivot = tl.where(counted & (count == 0.0), x, pivot)
            deviation = tl.where(counted, x - pivot, 0.0)  # values with weight 0 may be NaN
            count += w
            first += w * deviation
            second += w * deviation * deviation
    n, mean, mean_low, m2 = join(count, pivot, first, second, 0 if ROWS else None)
    if GROUP > 0:
        n, mean, mean_low, m2 = join_positions(n, mean, mean_low, m2, positions, GROUP, B1)
    channel, valid = results_of(block, channels, channel, valid, GROUP)
    if counters_ptr is None and parts_ptr is not None:
        store_part(parts_ptr, split, rows, channels, channel, valid, n, mean, mean_low, m2)
    else:
        number, position, row = splits, split, splits * 0
        if parts_ptr is not None:
            while number > 1:
                store_part(parts_ptr, row + position, rows, channels, channel, valid, n, mean, mean_low, m2)
                group, start, members, groups = neighbors(position, number)
                if is_last(counters_ptr + (row + group).to(tl.int64) * blocks + block, members):
                    n, mean, mean_low, m2 = merge_parts(
                        parts_ptr, row + start, members, rows, channels, channel, valid, ROWS, GROUP, B1
                    )
                    row += number
                    number, position = groups, group
                else:
                    number = number * 0  # another program goes on
        if number == 1:
            dtype = x_ptr.dtype.element_ty
            store_moments(mean_ptr, mean_low_ptr, m2_ptr, channel, valid, n, mean, mean_low, m2, dtype, VARIANCE)


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    parts_ptr, index_ptr, sample_counts_ptr, count_ptr, mean_ptr, mean_low_ptr, m2_ptr, channels, splits, blocks,
    dtype: tl.constexpr, VARIANCE: tl.constexpr, VALUES: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Merge `parts [4, splits, C]`; with an index, separately for each group of splits, with a float64 count.

    With `VALUES`, each split is a sample of one value, and the parts are x `[N, C]`, which takes less memory.
    """
    block, group = program(blocks, False)
    channel, valid = channels_of(block, channels, 1, True, 0, B1)
    count = tl.zeros([B0, B1], tl.float32)
    pivot = tl.zeros([B0, B1], tl.float32)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    exact = tl.zeros([B0, 1], tl.float64)
    for start in range(0, splits, B0):
        split, there = group_of_splits(start, splits, index_ptr, group, B0)
        if index_ptr is not None:
            samples = tl.load(sample_counts_ptr + split, there, 0.0)
            exact += samples
        there = there & valid
        if VALUES:
            n = tl.where(there, samples.to(tl.float32), 0.0)
            there = there & (n > 0.0)
            x = tl.load(parts_ptr + split.to(tl.int64) * channels + channel, there, 0.0).to(tl.float32)
            pivot = tl.where(there & (count == 0.0), x, pivot)
            deviation = tl.where(there, x - pivot, 0.0)
            count += n
            first += n * deviation
            second += n * deviation * deviation
        else:
            count, pivot, first, second = add_parts(
                parts_ptr, split, splits, channels, channel, there, count, pivot, first, second
            )
    n, mean, mean_low, m2 = join(count, pivot, first, second, 0)
    at = group.to(tl.int64) * channels + channel
    store_moments(mean_ptr, mean_low_ptr, m2_ptr, at, valid, n, mean, mean_low, m2, dtype, VARIANCE)
    if index_ptr is not None:
        tl.store(count_ptr + group, tl.sum(tl.sum(exact, 1), 0), block == 0)
