"""Compute Σ dz and Σ dz·x̂, and dx from them; in one kernel if a program holds all values of its channels."""

import triton
import triton.language as tl

from .finish import axis_of, is_last, members_of, neighbors, step_of
from .pointwise import coefficients, coefficients_of_lines, load_x_and_dz
from .tiles import (
    SIZES,
    channels_of,
    columns_of,
    first_columns,
    group_of_splits,
    half,
    load_weights,
    masked,
    offsets,
    product,
    program,
    results_of,
    span,
    store,
    sum_positions,
    total,
    total_everywhere,
    whole_block,
)


@triton.jit
def negated_share(constant, slope, mean_low):
    """Return the coefficients of −(constant + ((x − mean) − mean_low)·slope) as a function of x − mean."""
    return tl.fma(mean_low, slope, -constant), -slope


@triton.jit
def through_statistics(dz, deviation, w, scale, constant, slope):
    """Return dx = γ·invstd·dz + w·(constant + (x − mean)·slope)."""
    like = tl.zeros_like(dz)
    share = tl.fma(deviation, like + slope, like + constant) * w
    return tl.fma(dz, like + scale, share)


@triton.jit
def shares_of(means, at, valid, factor, invstd, mean_low):
    """Return the coefficients of the share of dx that passes through the statistics."""
    mean_dxhat_ptr, mean_dxhat_xhat_ptr = means
    constant = tl.load(mean_dxhat_ptr + at, valid, 0.0) * factor
    return negated_share(constant, tl.load(mean_dxhat_xhat_ptr + at, valid, 0.0) * factor * invstd, mean_low)


@triton.jit
def add_terms(
    data, dx_ptr, dz_ptr, k, end, place, there, coefs, first, second, negative_slope,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, B0: tl.constexpr, VEC: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Add TILES tiles to Σ dz and Σ dz·(x − mean)."""
    mean, _mean_low, _invstd, scale, shift = coefs
    for u in tl.static_range(TILES):
        offset, mask = offsets(k + u * B0, place, ROWS, VEC), masked(there, k + u * B0, end, MASKED)
        x, dz = load_x_and_dz(data, offset, mask, mean, scale, shift, negative_slope, ACTIVATION, MASKED, False)
        deviation = x - mean
        if MASKED:
            deviation = tl.where(mask, deviation, 0.0)
        first += dz
        second = tl.fma(dz, deviation, second)
        store(dx_ptr, offset, dz * scale, mask)
        store(dz_ptr, offset, dz, mask)
    return first, second


@triton.jit
def store_sums(parts_ptr, row, rows, channels, channel, valid, sum_dz, sum_dz_xhat):
    """Write sums to a row of `parts [2, rows, C]`."""
    at = parts_ptr + row.to(tl.int64) * channels + channel
    tl.store(at, sum_dz, valid)
    tl.store(at + rows.to(tl.int64) * channels, sum_dz_xhat, valid)


@triton.jit
def add_sums(parts_ptr, row, rows, channels, channel, there, first, second):
    """Add rows of `parts [2, rows, C]`, reading what other programs have written."""
    at = parts_ptr + row.to(tl.int64) * channels + channel
    first += tl.load(at, there, 0.0, cache_modifier=".cg")
    second += tl.load(at + rows.to(tl.int64) * channels, there, 0.0, cache_modifier=".cg")
    return first, second


@triton.jit
def merge_sums(
    parts_ptr, begin, members, rows, channels, channel, valid,
    ROWS: tl.constexpr, GROUP: tl.constexpr, B1: tl.constexpr,
):  # fmt: skip
    """Add up some rows of `parts`, from `begin` on."""
    axis: tl.constexpr = axis_of(ROWS, GROUP)
    row, there = members_of(begin, 0, members, ROWS, GROUP, B1)
    first = tl.zeros((row + channel).shape, tl.float32)
    second = first
    for start in range(0, members, step_of(ROWS, GROUP, B1)):
        row, there = members_of(begin, start, members, ROWS, GROUP, B1)
        first, second = add_sums(parts_ptr, row, rows, channels, channel, there & valid, first, second)
    return total(first, axis), total(second, axis)


@triton.jit(do_not_specialize=SIZES)
def backward_reduce_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    index_ptr, parts_ptr, counters_ptr, sum_dz_ptr, sum_dz_xhat_ptr,
    eps, negative_slope,
    lines, width, positions, magic, bits, channels, rows, stride_statistic, stride_affine, per, splits,
    part_rows, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Write the sums of a block. The last programs merge its splits, whose sums are in `parts [2, part_rows, C]`.

    Without counters, only write the sums of splits to `parts`, for another kernel that merges them.
    With constant statistics, dx needs no sums. With `dx_ptr`, this kernel therefore also writes dx and dz.
    """
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    place, there = columns_of(block, channels, positions, width, magic, bits, ROWS, GROUP, B1, VEC, WIDE)
    tiles: tl.constexpr = half(AHEAD)
    begin, full, end = span(split, per, lines, B0 * tiles, WIDE)
    row, existing = split * 0, valid
    if index_ptr is not None:
        row = tl.load(index_ptr + split)
        existing = valid & (row >= 0) & (row < rows)
    data = (dy_ptr, x_ptr, residual_ptr, y_ptr)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    coefs = coefficients(vectors, row, channel, existing, stride_statistic, stride_affine, eps)
    lane = tl.arange(0, B0)[:, None]
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for k in range(begin, full, B0 * tiles):
        first, second = add_terms(
            data, dx_ptr, dz_ptr, k + lane, end, place, there, coefs, first, second, negative_slope,
            ACTIVATION, False, ROWS, B0, VEC, tiles,
        )  # fmt: skip
    if full < end:
        first, second = add_terms(
            data, dx_ptr, dz_ptr, full + lane, end, place, there, coefs, first, second, negative_slope,
            ACTIVATION, True, ROWS, B0, VEC, tiles,
        )  # fmt: skip
    if ROWS:  # load the vectors again, because those that the loop does not need would take registers there
        tl.debug_barrier()  # otherwise, the compiler may reuse the first ones
        coefs = coefficients(vectors, row, channel, existing, stride_statistic, stride_affine, eps)
    sum_dz = total(first, 0 if ROWS else None)
    sum_dz_xhat = (total(second, 0 if ROWS else None) - coefs[1] * sum_dz) * coefs[2]
    sum_dz = sum_positions(sum_dz, positions, GROUP, B1)
    sum_dz_xhat = sum_positions(sum_dz_xhat, positions, GROUP, B1)
    channel, valid = results_of(block, channels, channel, valid, GROUP)
    if counters_ptr is None and parts_ptr is not None:
        store_sums(parts_ptr, split, part_rows, channels, channel, valid, sum_dz, sum_dz_xhat)
    else:
        number, position, row = splits, split, splits * 0
        if parts_ptr is not None:
            while number > 1:
                store_sums(parts_ptr, row + position, part_rows, channels, channel, valid, sum_dz, sum_dz_xhat)
                group, start, members, groups = neighbors(position, number)
                if is_last(counters_ptr + (row + group).to(tl.int64) * blocks + block, members):
                    sum_dz, sum_dz_xhat = merge_sums(
                        parts_ptr, row + start, members, part_rows, channels, channel, valid, ROWS, GROUP, B1
                    )
                    row += number
                    number, position = groups, group
                else:
                    number = number * 0  # another program goes on
        if number == 1:
            tl.store(sum_dz_ptr + channel, sum_dz, valid)
            tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, valid)


@triton.jit(do_not_specialize=SIZES)
def merge_sums_kernel(
    parts_ptr, index_ptr, sum_dz_ptr, sum_dz_xhat_ptr, channels, splits, blocks, B0: tl.constexpr, B1: tl.constexpr
):
    """Add up `parts [2, splits, C]`; with an index, separately for each group of splits."""
    block, group = program(blocks, False)
    channel, valid = channels_of(block, channels, 1, True, 0, B1)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for start in range(0, splits, B0):
        split, there = group_of_splits(start, splits, index_ptr, group, B0)
        first, second = add_sums(parts_ptr, split, splits, channels, channel, there & valid, first, second)
    at = group.to(tl.int64) * channels + channel
    tl.store(sum_dz_ptr + at, total(first, 0), valid)
    tl.store(sum_dz_xhat_ptr + at, total(second, 0), valid)


@triton.jit
def apply_lines(
    data, dx_ptr, dz_ptr, means, weights_ptr, k, end, place, there, source, constants, shares, positions,
    negative_slope,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr,
    B1: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Compute dx and dz of a tile. x and dy are read for the last time."""
    offset, mask = offsets(k, place, ROWS, VEC), masked(there, k, end, MASKED)
    row, existing, found = coefficients_of_lines(source, constants, k, end, place)
    mean, mean_low, invstd, scale, shift = found
    x, dz = load_x_and_dz(data, offset, mask, mean, scale, shift, negative_slope, ACTIVATION, False, True)
    if means[0] is None:
        dx = dz * scale
    else:
        if shares is not None:
            constant, slope = shares
        else:
            constant, slope = shares_of(means, row * source[5] + source[3], existing, invstd, invstd, mean_low)
        w = 1.0
        if weights_ptr is not None:
            w = load_weights(weights_ptr, k, positions, mask, ROWS, GROUP, B0, B1)
        dx = through_statistics(dz, x - mean, w, scale, constant, slope)
    store(dx_ptr, offset, dx, mask)
    store(dz_ptr, offset, dz, mask)


@triton.jit(do_not_specialize=SIZES)
def backward_apply_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    mean_dxhat_ptr, mean_dxhat_xhat_ptr, index_ptr, weights_ptr,
    eps, negative_slope, values,
    lines, width, positions, magic, bits, channels, rows, stride_statistic, stride_affine, per, blocks,
    ACTIVATION: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr,
    B1: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute dx and dz of a block's split from the means of dx̂ and dx̂·x̂.

    With `SUMS`, the arguments are Σ dz and Σ dz·x̂ of the batch instead of the means.
    """
    block, split = program(blocks, True)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    place, there = columns_of(block, channels, positions, width, magic, bits, ROWS, GROUP, B1, VEC, WIDE)
    step: tl.constexpr = B0 * half(AHEAD)
    begin, full, end = span(split, per, lines, step, WIDE)
    lane = tl.arange(0, step)[:, None]
    data = (dy_ptr, x_ptr, residual_ptr, y_ptr)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    means = (mean_dxhat_ptr, mean_dxhat_xhat_ptr)
    constants, shares = None, None
    if index_ptr is None:
        constants = coefficients(vectors, 0, channel, valid, 0, 0, eps)
        if mean_dxhat_ptr is not None:
            factor = constants[3] / values if SUMS else constants[2]
            shares = shares_of(means, channel, valid, factor, constants[2], constants[1])
    source = (index_ptr, vectors, rows, channel, valid, stride_statistic, stride_affine, eps)
    if full < end:
        apply_lines(
            data, dx_ptr, dz_ptr, means, weights_ptr, full + lane, end, place, there, source, constants, shares,
            positions, negative_slope, ACTIVATION, True, ROWS, GROUP, step, B1, VEC,
        )  # fmt: skip
    for back in range(begin, full, step):  # backward, from what the sums read last
        k = begin + full - step - back
        apply_lines(
            data, dx_ptr, dz_ptr, means, weights_ptr, k + lane, end, place, there, source, constants, shares,
            positions, negative_slope, ACTIVATION, False, ROWS, GROUP, step, B1, VEC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def backward_once_kernel(
    dy_ptr, x_ptr, residual_ptr, y_ptr, dx_ptr, dz_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    sum_dz_ptr, sum_dz_xhat_ptr,
    eps, negative_slope, values, lines, width, positions, magic, bits, channels, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute all gradients of a block that fits into one tile, reading x and dy once."""
    block, _ = program(blocks, False)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    offset, mask = whole_block(block, lines, channels, positions, ROWS, GROUP, B0, B1, VEC, WIDE)
    data = (dy_ptr, x_ptr, residual_ptr, y_ptr)
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    mean, mean_low, invstd, scale, shift = coefficients(vectors, 0, channel, valid, 0, 0, eps)
    x, dz = load_x_and_dz(data, offset, mask, mean, scale, shift, negative_slope, ACTIVATION, True, False)
    store(dz_ptr, offset, dz, mask)
    deviation = tl.where(mask, (x - mean) - mean_low, 0.0)
    sum_dz = total_everywhere(dz, positions, ROWS, GROUP, B1)
    sum_dz_xhat = total_everywhere(product(dz, deviation), positions, ROWS, GROUP, B1) * invstd
    written = first_columns(valid, positions, GROUP, B1)
    tl.store(sum_dz_ptr + channel, sum_dz, written)
    tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, written)
    share = scale / values
    constant, slope = negated_share(sum_dz * share, sum_dz_xhat * share * invstd, mean_low)
    dx = through_statistics(dz, x - mean, 1.0, scale, constant, slope)
    store(dx_ptr, offset, dx, mask)
