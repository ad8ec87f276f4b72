"""Compute y from given statistics, or statistics and y in one kernel if a program holds all values of its channels."""

import triton
import triton.language as tl

from .moments import rounded_pair
from .pointwise import activate, coefficients, coefficients_of_lines, preactivation, scale_and_shift, vector
from .running import update_with_forward
from .tiles import (
    SIZES,
    channels_of,
    columns_of,
    first_columns,
    half,
    load,
    masked,
    offsets,
    product,
    program,
    results_of,
    span,
    store,
    total_everywhere,
    whole_block,
)


@triton.jit
def normalize_lines(
    x_ptr, residual_ptr, y_ptr, k, end, place, there, source, constants, negative_slope,
    ACTIVATION: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Compute y of a tile. x is read for the last time."""
    offset, mask = offsets(k, place, ROWS, VEC), masked(there, k, end, MASKED)
    x = load(x_ptr, offset, mask, True)
    _, _, found = coefficients_of_lines(source, constants, k, end, place)
    mean, _, _, scale, shift = found
    z = preactivation(x, mean, scale, shift, residual_ptr, offset, mask, True)
    store(y_ptr, offset, activate(z, negative_slope, ACTIVATION), mask)


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr, index_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, eps, negative_slope, values, momentum,
    lines, width, positions, magic, bits, channels, rows, stride_statistic, stride_affine, per, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Compute y of a block's split; NaN for an index outside the rows of the statistics."""
    block, split = program(blocks, True)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    place, there = columns_of(block, channels, positions, width, magic, bits, ROWS, GROUP, B1, VEC, WIDE)
    step: tl.constexpr = B0 * half(AHEAD)
    begin, full, end = span(split, per, lines, step, WIDE)
    lane = tl.arange(0, step)[:, None]
    vectors = (mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr)
    constants = None if index_ptr is not None else coefficients(vectors, 0, channel, valid, 0, 0, eps)
    if running_mean_ptr is not None:  # by one program for each channel
        running = (running_mean_ptr, running_var_ptr, tracked_ptr)
        at, exists = results_of(block, channels, channel, valid, GROUP)
        first = exists & (split == 0)
        mean, mean_low = tl.load(mean_ptr + at, first, 0.0), tl.load(mean_low_ptr + at, first, 0.0)
        var = tl.load(var_ptr + at, first, 0.0)
        update_with_forward(running, at, first, mean, mean_low, var, values, momentum)
    source = (index_ptr, vectors, rows, channel, valid, stride_statistic, stride_affine, eps)
    if full < end:
        normalize_lines(
            x_ptr, residual_ptr, y_ptr, full + lane, end, place, there, source, constants, negative_slope,
            ACTIVATION, True, ROWS, VEC,
        )  # fmt: skip
    for back in range(begin, full, step):  # backward, from what moments read last
        k = begin + full - step - back
        normalize_lines(
            x_ptr, residual_ptr, y_ptr, k + lane, end, place, there, source, constants, negative_slope,
            ACTIVATION, False, ROWS, VEC,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_once_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, eps, negative_slope, values, momentum,
    lines, width, positions, magic, bits, channels, blocks,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute moments and y of a block that fits into one tile, reading x once."""
    block, _ = program(blocks, False)
    channel, valid = channels_of(block, channels, positions, ROWS, GROUP, B1)
    offset, mask = whole_block(block, lines, channels, positions, ROWS, GROUP, B0, B1, VEC, WIDE)
    x = load(x_ptr, offset, mask, False)
    pivot = load(x_ptr, channel.to(tl.int64) * (1 if ROWS and GROUP == 0 else positions), valid, False)
    mean = pivot + total_everywhere(tl.where(mask, x - pivot, 0.0), positions, ROWS, GROUP, B1) / values
    mean_low = total_everywhere(tl.where(mask, x - mean, 0.0), positions, ROWS, GROUP, B1) / values
    mean, mean_low = rounded_pair(mean, mean_low, x_ptr.dtype.element_ty)
    deviation = tl.where(mask, (x - mean) - mean_low, 0.0)
    m2 = total_everywhere(product(deviation, deviation), positions, ROWS, GROUP, B1)
    var = tl.div_rn(m2, tl.zeros_like(mean) + values)
    written = first_columns(valid, positions, GROUP, B1)
    tl.store(mean_ptr + channel, mean, written)
    tl.store(mean_low_ptr + channel, mean_low, written)
    tl.store(var_ptr + channel, var, written)
    running = (running_mean_ptr, running_var_ptr, tracked_ptr)
    update_with_forward(running, channel, written, mean, mean_low, var, values, momentum)
    weight = vector(weight_ptr, channel, valid, 1.0, var)
    bias = vector(bias_ptr, channel, valid, 0.0, var)
    _, scale, shift = scale_and_shift(mean_low, var, weight, bias, eps)
    z = preactivation(x, mean, scale, shift, residual_ptr, offset, mask, False)
    store(y_ptr, offset, activate(z, negative_slope, ACTIVATION), mask)
