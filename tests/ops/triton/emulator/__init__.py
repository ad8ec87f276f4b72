"""An emulator of a GPU: it runs the PTX that Triton compiles, on the CPU, and reports what a device would not.

| file | contents |
|---|---|
| `ptx.py` | parses PTX |
| `lanes.py` | registers and operands of all threads, as arrays |
| `instructions/` | instructions that compute (`arithmetic.py`, `conversions.py`), access memory, or need a warp |
| `memory/bytes.py` | memory that checks initialization and data races |
| `memory/regions.py` | addresses of tensors, with their bounds and alignment |
| `memory/order.py` | which accesses are ordered by barriers, atomics and fences |
| `memory/copies.py` | asynchronous copies to shared memory |
| `memory/allocations.py` | which memory of torch's tensors has been written |
| `machine.py`, `schedule.py` | runs the programs of a launch, all together or in a random order |
| `device.py`, `driver.py` | the device, and its place in Triton |

Every fault raises `Fault` with the kernel, the instruction and the line of source.
"""
