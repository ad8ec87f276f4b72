"""Compute y from given statistics, or statistics and y in one kernel if a program holds all values of its channels."""

import triton
import triton.language as tl

from .moments import rounded_pair
from .pointwise import activate, coefficients, preactivation, scale_and_shift, vector
from .tiles import SIZES, channels_of, load, load_rows, product, program, span, store, tile, total


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr, index_ptr,
    eps, negative_slope,
    size0, size1, stride0, channels, positions, rows, stride_statistic, stride_affine, per, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute y of a block's split; NaN for an index outside the rows of the statistics."""
    block, split = program(blocks, True)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    if index_ptr is None:
        mean, _, _, scale, shift = coefficients(vectors, 0, channel, valid, 0, 0, eps)
    for t in tl.range(tiles, num_stages=STAGES):
        i, _j, offset, mask = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        if index_ptr is not None:
            row, there = load_rows(index_ptr, i, end, positions, rows, valid, ROWS)
            mean, _, _, scale, shift = coefficients(vectors, row, channel, there, stride_statistic, stride_affine, eps)
        z = preactivation(load(x_ptr, offset, mask), mean, scale, shift, residual_ptr, offset, mask)
        store(y_ptr, offset, activate(z, negative_slope, ACTIVATION), mask)


@triton.jit(do_not_specialize=SIZES)
def forward_once_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    eps, negative_slope, values, size0, size1, stride0, channels, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute moments and y of a block that fits into one tile, reading x once."""
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, _ = span(split, size0, size0, size1, ROWS, B0, B1, WIDE)
    _, _, offset, mask = tile(begin, end, 0, block, size1, stride0, ROWS, B0, B1, VEC)
    x = load(x_ptr, offset, mask)
    pivot = load(x_ptr, channel if ROWS else channel.to(tl.int64) * size1, valid)
    mean = pivot + total(tl.where(mask, x - pivot, 0.0), ROWS) / values
    mean_low = total(tl.where(mask, x - mean, 0.0), ROWS) / values
    mean, mean_low = rounded_pair(mean, mean_low, x_ptr.dtype.element_ty)
    deviation = tl.where(mask, (x - mean) - mean_low, 0.0)
    var = tl.div_rn(total(product(deviation, deviation), ROWS), tl.zeros_like(mean) + values)
    tl.store(mean_ptr + channel, mean, valid)
    tl.store(mean_low_ptr + channel, mean_low, valid)
    tl.store(var_ptr + channel, var, valid)
    weight = vector(weight_ptr, channel, valid, 1.0, var)
    bias = vector(bias_ptr, channel, valid, 0.0, var)
    _, scale, shift = scale_and_shift(mean_low, var, weight, bias, eps)
    z = preactivation(x, mean, scale, shift, residual_ptr, offset, mask)
    store(y_ptr, offset, activate(z, negative_slope, ACTIVATION), mask)
