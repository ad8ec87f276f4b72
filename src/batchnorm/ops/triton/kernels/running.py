"""The update of the running statistics."""

import triton
import triton.language as tl


@triton.jit
def converted(value, dtype: tl.constexpr):
    """Convert float64 to the dtype of a running statistic. Half precision is rounded as torch does: from float32."""
    step: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    return value.to(step).to(dtype)


@triton.jit
def update_channels(running_mean_ptr, running_var_ptr, at, there, mean, mean_low, var, n, rate):
    """Move the running statistics of channels toward a batch's, in float64; n and rate are float64 scalars."""
    old_mean = tl.load(running_mean_ptr + at, there, 0.0).to(tl.float64)
    old_var = tl.load(running_var_ptr + at, there, 0.0).to(tl.float64)
    new_mean = mean.to(tl.float64) + mean_low
    new_var = var.to(tl.float64) * (n / tl.where(n > 1.0, n - 1.0, 1.0))
    tl.debug_barrier()  # wait until all threads that hold the same channel have read
    moved_mean = old_mean * (1.0 - rate) + new_mean * rate
    moved_var = old_var * (1.0 - rate) + new_var * rate
    tl.store(running_mean_ptr + at, converted(moved_mean, running_mean_ptr.dtype.element_ty), there)
    moved_var = tl.where(n > 1.0, moved_var, old_var)  # a single value has no variance
    tl.store(running_var_ptr + at, converted(moved_var, running_var_ptr.dtype.element_ty), there)


@triton.jit
def update_with_forward(running, at, there, mean, mean_low, var, values, momentum):
    """Update the running statistics of a program's channels, and, in the first program, the counter.

    `values` is the number of values of a channel, at least 1.
    """
    running_mean_ptr, running_var_ptr, tracked_ptr = running
    if running_mean_ptr is not None:
        n, rate = tl.cast(values, tl.float64), tl.cast(momentum, tl.float64)
        update_channels(running_mean_ptr, running_var_ptr, at, there, mean, mean_low, var, n, rate)
        if tracked_ptr is not None:
            tl.atomic_add(tracked_ptr, 1, tl.program_id(0) == 0, sem="relaxed")


@triton.jit(do_not_specialize=["m", "momentum", "channels"])
def update_running_kernel(
    running_mean_ptr, running_var_ptr, tracked_ptr, mean_ptr, mean_low_ptr, var_ptr, count_ptr, momentum, m, channels,
    SKIP: tl.constexpr, CUMULATIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the running statistics in float64, in one program, because one non-finite value prevents the update."""
    n = m.to(tl.float64)
    if count_ptr is not None:
        n = tl.load(count_ptr).to(tl.float64)
    moves = n > 0.0
    if SKIP:
        nonfinite = 0
        for start in range(0, channels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < channels
            magnitudes = (
                tl.abs(tl.load(mean_ptr + at, there, 0.0))
                + tl.abs(tl.load(mean_low_ptr + at, there, 0.0)).to(tl.float64)
                + tl.abs(tl.load(var_ptr + at, there, 0.0))
            )
            nonfinite += tl.sum(tl.where(magnitudes < float("inf"), 0, 1), 0)
        moves = moves & (nonfinite == 0)
    rate = tl.cast(momentum, tl.float64)
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr) + moves.to(tl.int64)
        tl.debug_barrier()  # wait until all threads have read
        tl.store(tracked_ptr, tracked)
        if CUMULATIVE:
            rate = 1.0 / tl.maximum(tracked, 1).to(tl.float64)
    if moves:
        for start in range(0, channels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < channels
            mean = tl.load(mean_ptr + at, there, 0.0)
            mean_low = tl.load(mean_low_ptr + at, there, 0.0)
            var = tl.load(var_ptr + at, there, 0.0)
            update_channels(running_mean_ptr, running_var_ptr, at, there, mean, mean_low, var, n, rate)
