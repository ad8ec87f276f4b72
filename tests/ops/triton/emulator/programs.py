"""Short programs in PTX, for tests of the emulator."""

from __future__ import annotations

from torch import Tensor

from tests.ops.triton.emulator.device import Argument, Device
from tests.ops.triton.emulator.schedule import Schedule

_HEADER = """
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .b64 %d<32>;
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
{body}
ret;
}}
"""


def run(
    body: str, *tensors: Tensor, threads: int = 32, programs: int = 1, shared: int = 0, seed: int | None = None,
    device: Device | None = None,
) -> None:  # fmt: skip
    """Run instructions. %r0 is the thread, %r1 the program, and %d0, %d1, ... are the tensors' addresses."""
    text = _HEADER.format(
        parameters=", ".join(f".param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(len(tensors))),
        loads=" ".join(f"ld.param.b64 %d{i}, [kernel_param_{i}];" for i in range(len(tensors))),
        threads=threads,
        body=body,
    )
    device = Device(Schedule(seed)) if device is None else device
    arguments = [Argument(f"tensor{i}", "*fp32", t) for i, t in enumerate(tensors)]
    device.launch(device.load(text, shared), programs, arguments)
