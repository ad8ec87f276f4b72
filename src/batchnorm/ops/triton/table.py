"""The settings of each class of tensors; `python -m benchmarks gpu --tune` measures and writes them.

Chosen by reasoning: not yet measured on a device.
"""

from batchnorm.ops.triton.settings import Settings

# The keys: whether channels are innermost, and the bytes of a value.
TABLE = {
    (False, 2): Settings(tile=2048, warps=8, ahead=4, programs=4, row_bytes=256, once=32768),
    (False, 4): Settings(tile=2048, warps=8, ahead=2, programs=4, row_bytes=256, once=32768),
    (True, 2): Settings(tile=2048, warps=8, ahead=4, programs=4, row_bytes=256, once=32768),
    (True, 4): Settings(tile=2048, warps=8, ahead=2, programs=4, row_bytes=256, once=32768),
}
