"""Σ dz and Σ dz·x̂, and dx from them; and all at once where a program holds all values of its channels."""

import triton
import triton.language as tl

from .pointwise import coefficients, upstream
from .tiles import channels_of, program, span, tile, total


@triton.jit
def through_statistics(dz, deviation, w, scale, constant, slope):
    """dx = γ·invstd·dz − w·(constant + (x − mean)·slope)."""
    like = tl.zeros_like(dz)
    share = tl.fma(deviation, like + slope, like + constant) * w
    return tl.fma(dz, like + scale, -share)


@triton.jit(
    do_not_specialize=[
        "size0",
        "size1",
        "stride0",
        "channels",
        "rows",
        "stride_statistic",
        "stride_affine",
        "per",
        "splits",
        "blocks",
    ]
)
def backward_reduce_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    y_ptr,
    dx_ptr,
    dz_ptr,
    mean_ptr,
    mean_low_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    parts_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    eps,
    negative_slope,
    size0,
    size1,
    stride0,
    channels,
    rows,
    stride_statistic,
    stride_affine,
    per,
    splits,
    blocks,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of a block's split into `parts [2, splits, C]`, or, with no parts, of the whole block as results.

    Where the statistics are held, dx needs no sums: with `dx_ptr`, dx and dz are written on the way.
    """
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    row = split * 0
    there = valid
    if index_ptr is not None:
        row = tl.load(index_ptr + split)
        there = valid & (row >= 0) & (row < rows)
    mean, mean_low, invstd, scale, shift = coefficients(
        mean_ptr,
        mean_low_ptr,
        var_ptr,
        weight_ptr,
        bias_ptr,
        row,
        channel,
        there,
        stride_statistic,
        stride_affine,
        eps,
    )
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for t in tl.range(tiles, num_stages=STAGES):
        _, _, offset, mask = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
        first += dz
        second += dz * tl.where(mask, (x - mean) - mean_low, 0.0)
        if dx_ptr is not None:
            tl.store(dx_ptr + offset, (dz * scale).to(dx_ptr.dtype.element_ty), mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask)
    sum_dz = total(first, ROWS)
    sum_dz_xhat = total(second, ROWS) * invstd
    if parts_ptr is None:
        tl.store(sum_dz_ptr + channel, sum_dz, valid)
        tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, valid)
    else:
        at = parts_ptr + split.to(tl.int64) * channels + channel
        tl.store(at, sum_dz, valid)
        tl.store(at + splits.to(tl.int64) * channels, sum_dz_xhat, valid)


@triton.jit(do_not_specialize=["channels", "splits", "blocks"])
def merge_sums_kernel(
    parts_ptr,
    index_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    channels,
    splits,
    blocks,
    B0: tl.constexpr,
    B1: tl.constexpr,
):
    """`parts [2, splits, C]` together; with index, of each group of splits."""
    block, group = program(blocks, False)
    channel, valid = channels_of(block, channels, True, B1, 1)
    first = tl.zeros([B0, B1], tl.float32)
    second = tl.zeros([B0, B1], tl.float32)
    for start in range(0, splits, B0):
        split = start + tl.arange(0, B0)[:, None]
        there = split < splits
        if index_ptr is not None:
            there = there & (tl.load(index_ptr + split, there, -1) == group)
        there = there & valid
        at = parts_ptr + split.to(tl.int64) * channels + channel
        first += tl.load(at, there, 0.0)
        second += tl.load(at + splits.to(tl.int64) * channels, there, 0.0)
    at = group.to(tl.int64) * channels + channel
    tl.store(sum_dz_ptr + at, total(first, True), valid)
    tl.store(sum_dz_xhat_ptr + at, total(second, True), valid)


@triton.jit(
    do_not_specialize=[
        "values",
        "size0",
        "size1",
        "stride0",
        "channels",
        "positions",
        "rows",
        "stride_statistic",
        "stride_affine",
        "per",
        "blocks",
    ]
)
def backward_apply_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    y_ptr,
    dx_ptr,
    dz_ptr,
    mean_ptr,
    mean_low_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    mean_dxhat_ptr,
    mean_dxhat_xhat_ptr,
    index_ptr,
    weights_ptr,
    eps,
    negative_slope,
    values,
    size0,
    size1,
    stride0,
    channels,
    positions,
    rows,
    stride_statistic,
    stride_affine,
    per,
    blocks,
    ACTIVATION: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, and dz, of a block's split from the means of dx̂ and dx̂·x̂; or (`SUMS`) from Σ dz and Σ dz·x̂ of the batch."""
    block, split = program(blocks, True)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, tiles = span(split, per, size0, size1, ROWS, B0, B1, WIDE)
    if index_ptr is None:
        mean, mean_low, invstd, scale, shift = coefficients(
            mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr, 0, channel, valid, 0, 0, eps
        )
        if mean_dxhat_ptr is not None:
            constant = tl.load(mean_dxhat_ptr + channel, valid, 0.0) * (scale / values if SUMS else invstd)
            slope = tl.load(mean_dxhat_xhat_ptr + channel, valid, 0.0) * (scale / values if SUMS else invstd) * invstd
    for t in tl.range(tiles, num_stages=STAGES):
        i, j, offset, mask = tile(begin, end, t, block, size1, stride0, ROWS, B0, B1, VEC)
        if index_ptr is not None:
            row = tl.load(index_ptr + (i // positions if ROWS else i), i < end, 0)
            there = valid & (row >= 0) & (row < rows)
            mean, mean_low, invstd, scale, shift = coefficients(
                mean_ptr,
                mean_low_ptr,
                var_ptr,
                weight_ptr,
                bias_ptr,
                row,
                channel,
                there,
                stride_statistic,
                stride_affine,
                eps,
            )
            if mean_dxhat_ptr is not None:
                at = row * stride_statistic + channel
                constant = tl.load(mean_dxhat_ptr + at, there, 0.0) * invstd
                slope = tl.load(mean_dxhat_xhat_ptr + at, there, 0.0) * invstd * invstd
        x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
        dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
        if mean_dxhat_ptr is None:
            dx = dz * scale
        else:
            w = 1.0
            if weights_ptr is not None:
                place = i if ROWS else i * size1 + j
                w = tl.load(weights_ptr + tl.broadcast_to(place, [B0, B1]), mask, 0.0)
            dx = through_statistics(dz, (x - mean) - mean_low, w, scale, constant, slope)
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
        if dz_ptr is not None:
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["values", "size0", "size1", "stride0", "channels", "blocks"])
def backward_once_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    y_ptr,
    dx_ptr,
    dz_ptr,
    mean_ptr,
    mean_low_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    sum_dz_ptr,
    sum_dz_xhat_ptr,
    eps,
    negative_slope,
    values,
    size0,
    size1,
    stride0,
    channels,
    blocks,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    B0: tl.constexpr,
    B1: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All gradients of a block whose values are one tile: x and dy are read once."""
    block, split = program(blocks, False)
    channel, valid = channels_of(block, channels, ROWS, B1, VEC)
    begin, end, _ = span(split, size0, size0, size1, ROWS, B0, B1, WIDE)
    mean, mean_low, invstd, scale, shift = coefficients(
        mean_ptr, mean_low_ptr, var_ptr, weight_ptr, bias_ptr, 0, channel, valid, 0, 0, eps
    )
    _, _, offset, mask = tile(begin, end, 0, block, size1, stride0, ROWS, B0, B1, VEC)
    x = tl.load(x_ptr + offset, mask, 0.0).to(tl.float32)
    dz = upstream(dy_ptr, x, residual_ptr, y_ptr, offset, mask, mean, scale, shift, negative_slope, ACTIVATION)
    if dz_ptr is not None:
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask)
    deviation = tl.where(mask, (x - mean) - mean_low, 0.0)
    sum_dz = total(dz, ROWS)
    sum_dz_xhat = total(dz * deviation, ROWS) * invstd
    tl.store(sum_dz_ptr + channel, sum_dz, valid)
    tl.store(sum_dz_xhat_ptr + channel, sum_dz_xhat, valid)
    share = scale / values
    dx = through_statistics(dz, deviation, 1.0, scale, sum_dz * share, sum_dz_xhat * share * invstd)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
