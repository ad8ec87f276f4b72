"""Compute Σ dz and Σ dz·x̂, and dx from them; in one kernel if a program holds all values of its channels."""

import triton
import triton.language as tl

from .pointwise import coefficients, upstream
from .tiles import (
    SIZES,
    channels_of,
    group_of_splits,
    load,
    load_rows,
    load_weights,
    product,
    program,
    span,
    store,
    tile,
    total,
)


@triton.jit
def through_statistics(dz, deviation, w, scale, constant, slope):
    """Return dx = γ·invstd·dz − w·(constant + (x − mean)·slope)."""
    like = tl.zeros_like(dz)
    share = tl.fma(deviation, like + slope, like + constant) * w
    return tl.fma(dz, like + scale, -share)


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    index_ptr, parts_ptr, sum_dz_ptr, sum_dz_xhat_ptr,
    eps, negative_slope, size0, size1, stride0, channels, rows, stride_statistic, stride_affine, per, splits, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the sums of a block's split to `parts [2, splits, C]`, or without `parts`, those of the whole block.

    With constant statistics, dx needs no sums. With `dx_ptr`, this kernel therefore also writes dx and dz.
    """
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    row = split * 0
    there = valid
    if index_ptr is not None:
        row = tl.load(index_ptr + split)
        there = valid & (row >= 0) & (row < rows)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    mean, mean_low, invstd, scale, shift = coefficients(
        vectors, row, channel, there, stride_statistic, stride_affine, eps
    )
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for t in tl.range(tiles, num_stages=STAGES):
        _, _, offset, mask = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        x = load(x_ptr, offset, mask)
        dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
        first += dz
        second += dz * tl.where(mask, (x - mean) - mean_low, 0.0)
        store(dx_ptr, offset, dz * scale, mask)
        store(dz_ptr, offset, dz, mask)
    sum_dz = total(first, ROWS)
    sum_dz_xhat = total(second, ROWS) * invstd
    if parts_ptr is None:
        tl.store(sum_dz_ptr + channel, sum_dz, valid)
        tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, valid)
    else:
        at = parts_ptr + split.to(tl.int64) * channels + channel
        tl.store(at, sum_dz, valid)
        tl.store(at + splits.to(tl.int64) * channels, sum_dz_xhat, valid)


@triton.jit(do_not_specialize=SIZES)
def merge_sums_kernel(
    parts_ptr, index_ptr, sum_dz_ptr, sum_dz_xhat_ptr, channels, splits, blocks, B0: tl.constexpr, B1: tl.constexpr
):
    """Add up `parts [2, splits, C]`; with an index, separately for each group of splits."""
    block, group = program(blocks, False)
    channel, valid = channels_of(block, channels, True, B1, 1)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for start in range(0, splits, B0):
        split, there = group_of_splits(start, splits, index_ptr, group, B0)
        there = there & valid
        at = parts_ptr + split.to(tl.int64) * channels + channel
        first += tl.load(at, there, 0.0)
        second += tl.load(at + splits.to(tl.int64) * channels, there, 0.0)
    at = group.to(tl.int64) * channels + channel
    tl.store(sum_dz_ptr + at, total(first, True), valid)
    tl.store(sum_dz_xhat_ptr + at, total(second, True), valid)


@triton.jit(do_not_specialize=SIZES)
def backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    mean_dxhat_ptr, mean_dxhat_xhat_ptr, index_ptr, weights_ptr,
    eps, negative_slope, values,
    size0, size1, stride0, channels, positions, rows, stride_statistic, stride_affine, per, blocks,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute dx and dz of a block's split from the means of dx̂ and dx̂·x̂.

    With `SUMS`, the arguments are Σ dz and Σ dz·x̂ of the batch instead of the means.
    """
    block, split = program(blocks, True)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    if index_ptr is None:
        mean, mean_low, invstd, scale, shift = coefficients(vectors, 0, channel, valid, 0, 0, eps)
        if mean_dxhat_ptr is not None:
            constant = tl.load(mean_dxhat_ptr + channel, valid, 0.0) * (scale / values if SUMS else invstd)
            slope = tl.load(mean_dxhat_xhat_ptr + channel, valid, 0.0) * (scale / values if SUMS else invstd) * invstd
    for t in tl.range(tiles, num_stages=STAGES):
        i, j, offset, mask = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        if index_ptr is not None:
            row, there = load_rows(index_ptr, i, end, positions, rows, valid, ROWS)
            mean, mean_low, invstd, scale, shift = coefficients(
                vectors, row, channel, there, stride_statistic, stride_affine, eps
            )
            if mean_dxhat_ptr is not None:
                at = row * stride_statistic + channel
                constant = tl.load(mean_dxhat_ptr + at, there, 0.0) * invstd
                slope = tl.load(mean_dxhat_xhat_ptr + at, there, 0.0) * invstd * invstd
        x = load(x_ptr, offset, mask)
        dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
        if mean_dxhat_ptr is None:
            dx = dz * scale
        else:
            w = 1.0
            if weights_ptr is not None:
                w = load_weights(weights_ptr, i, j, size1, mask, ROWS, B0, B1)
            dx = through_statistics(dz, (x - mean) - mean_low, w, scale, constant, slope)
        store(dx_ptr, offset, dx, mask)
        store(dz_ptr, offset, dz, mask)


@triton.jit(do_not_specialize=SIZES)
def backward_once_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    sum_dz_ptr, sum_dz_xhat_ptr,
    eps, negative_slope, values, size0, size1, stride0, channels, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a block that fits into one tile, reading x and dy once."""
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, _ = span(split, size0, size0, size1, ROWS, B0, B1, WIDE)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    mean, mean_low, invstd, scale, shift = coefficients(vectors, 0, channel, valid, 0, 0, eps)
    _, _, offset, mask = tile(begin, end, 0, block, size1, stride0, ROWS, B0, B1, VEC)
    x = load(x_ptr, offset, mask)
    dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
    store(dz_ptr, offset, dz, mask)
    deviation = tl.where(mask, (x - mean) - mean_low, 0.0)
    sum_dz = total(dz, ROWS)
    sum_dz_xhat = total(product(dz, deviation), ROWS) * invstd
    tl.store(sum_dz_ptr + channel, sum_dz, valid)
    tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, valid)
    share = scale / values
    dx = through_statistics(dz, deviation, 1.0, scale, sum_dz * share, sum_dz_xhat * share * invstd)
    store(dx_ptr, offset, dx, mask)
