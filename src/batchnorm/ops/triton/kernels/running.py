"""The update of the running statistics."""

import triton
import triton.language as tl


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
        unbiased = n / tl.where(n > 1.0, n - 1.0, 1.0)
        spread = tl.where(n > 1.0, channels, 0)  # a single value has no variance
        for start in range(0, channels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            there = at < channels
            mean = tl.load(mean_ptr + at, there, 0.0).to(tl.float64) + tl.load(mean_low_ptr + at, there, 0.0)
            var = tl.load(var_ptr + at, there, 0.0).to(tl.float64) * unbiased
            old_mean = tl.load(running_mean_ptr + at, there, 0.0).to(tl.float64)
            old_var = tl.load(running_var_ptr + at, there, 0.0).to(tl.float64)
            new_mean = (old_mean * (1.0 - rate) + mean * rate).to(running_mean_ptr.dtype.element_ty)
            new_var = (old_var * (1.0 - rate) + var * rate).to(running_var_ptr.dtype.element_ty)
            tl.store(running_mean_ptr + at, new_mean, there)
            tl.store(running_var_ptr + at, new_var, at < spread)
