"""Compute the mean (as a pair) and the sum of squared deviations.

Each lane of a tile sums deviations from its own first value, its *pivot*, which is near the mean. The sums of the lanes
of all programs are merged by the formula of Chan, Golub and LeVeque.
"""

import triton
import triton.language as tl

from .tiles import SIZES, channels_of, group_of_splits, largest, load, load_weights, product, program, span, tile, total


@triton.jit
def join(count, pivot, first, second, ROWS: tl.constexpr):
    """Merge lanes into count, mean, mean_low and m2. Each lane has Σw, a pivot, Σw·d and Σw·d², where d = x − pivot.

    The mean is computed in two steps, so that one pivot far from the mean costs no accuracy. A constant channel
    deviates by exactly zero.
    """
    own = first / tl.where(count > 0.0, count, 1.0)
    second -= first * own
    second = tl.where(second < 0.0, 0.0, second)
    n = total(count, ROWS)
    divisor = tl.where(n > 0.0, n, 1.0)
    near = largest(tl.where(count > 0.0, pivot, float("-inf")), ROWS)
    near = tl.where(n > 0.0, near, 0.0)
    mean = near + total(product(count, (pivot - near) + own), ROWS) / divisor
    deviation = (pivot - mean) + own
    mean_low = total(product(count, deviation), ROWS) / divisor
    deviation -= mean_low
    return n, mean, mean_low, total(second + count * deviation * deviation, ROWS)


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


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    x_ptr, weights_ptr, parts_ptr, mean_ptr, mean_low_ptr, m2_ptr,
    size0, size1, stride0, channels, per, splits, blocks,
    VARIANCE: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the moments of a block's split to `parts [4, splits, C]`, or without `parts`, those of the whole block."""
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    count = tl.zeros([B0, B1], tl.float32)
    pivot = tl.zeros([B0, B1], tl.float32)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for t in tl.range(tiles, num_stages=STAGES):
        i, j, offset, counted = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        x = load(x_ptr, offset, counted)
        if weights_ptr is None:
            w = counted.to(tl.float32)
        else:
            w = load_weights(weights_ptr, i, j, size1, counted, ROWS, B0, B1)
            counted = w != 0.0
        pivot = tl.where(counted & (count == 0.0), x, pivot)
        deviation = tl.where(counted, x - pivot, 0.0)  # values with weight 0 may be NaN
        count += w
        weighted = deviation if weights_ptr is None else w * deviation
        first += weighted
        second += weighted * deviation
    n, mean, mean_low, m2 = join(count, pivot, first, second, ROWS)
    if parts_ptr is None:
        dtype = x_ptr.dtype.element_ty
        store_moments(mean_ptr, mean_low_ptr, m2_ptr, channel, valid, n, mean, mean_low, m2, dtype, VARIANCE)
    else:
        stride = splits.to(tl.int64) * channels
        at = parts_ptr + split.to(tl.int64) * channels + channel
        tl.store(at, n, valid)
        tl.store(at + stride, mean, valid)
        tl.store(at + 2 * stride, mean_low, valid)
        tl.store(at + 3 * stride, m2, valid)


@triton.jit(do_not_specialize=SIZES)
def merge_moments_kernel(
    parts_ptr, index_ptr, sample_counts_ptr, count_ptr, mean_ptr, mean_low_ptr, m2_ptr, channels, splits, blocks,
    dtype: tl.constexpr, VARIANCE: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Merge `parts [4, splits, C]`; with an index, separately for each group of splits, with a float64 count."""
    block, group = program(blocks, False)
    channel, valid = channels_of(block, channels, True, B1, 1)
    stride = splits.to(tl.int64) * channels
    count = tl.zeros([B0, B1], tl.float32)
    pivot = tl.zeros([B0, B1], tl.float32)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    exact = tl.zeros([B0, 1], tl.float64)
    for start in range(0, splits, B0):
        split, there = group_of_splits(start, splits, index_ptr, group, B0)
        if index_ptr is not None:
            exact += tl.load(sample_counts_ptr + split, there, 0.0)
        there = there & valid
        at = parts_ptr + split.to(tl.int64) * channels + channel
        n = tl.load(at, there, 0.0)
        there = there & (n > 0.0)
        mean = tl.load(at + stride, there, 0.0)
        mean_low = tl.load(at + 2 * stride, there, 0.0)
        pivot = tl.where(there & (count == 0.0), mean, pivot)
        deviation = tl.where(there, (mean - pivot) + mean_low, 0.0)
        count += n
        first += n * deviation
        second += n * deviation * deviation + tl.load(at + 3 * stride, there, 0.0)
    n, mean, mean_low, m2 = join(count, pivot, first, second, True)
    at = group.to(tl.int64) * channels + channel
    store_moments(mean_ptr, mean_low_ptr, m2_ptr, at, valid, n, mean, mean_low, m2, dtype, VARIANCE)
    if index_ptr is not None:
        tl.store(count_ptr + group, tl.sum(tl.sum(exact, 1), 0), block == 0)
