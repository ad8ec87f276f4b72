"""The smallest kernel, which shows whether a device can run any."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size"])
def smallest_kernel(out_ptr, value, size):
    """Store a value; the size is unused."""
    tl.store(out_ptr, value, size)
