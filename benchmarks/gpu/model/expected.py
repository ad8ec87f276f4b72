"""The expected time of a training step: from the instructions, bytes and launches of its kernels.

A kernel's time follows from three limits, of which the largest counts most:

- memory: its bytes, less those in the cache, at the memory's bandwidth;
- instructions: those of all warps, at the rate of all schedulers;
- its programs, one wave after another: each waits for its loads, and executes its instructions.

The constants below are assumptions. Nothing here was measured on a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.gpu.layers import Case
from benchmarks.gpu.model.devices import Device
from benchmarks.gpu.static import sass
from benchmarks.gpu.static.compiling import Launch, launches, training_step
from benchmarks.gpu.static.table import padding

# The share of the bandwidth, and of the schedulers' cycles, that a kernel without other limits reaches.
MEMORY, ISSUED = 0.93, 0.75
# Seconds from a load to its value under load, and from the end of a kernel to the start of the next in a graph.
LATENCY, GAP = 0.7e-6, 2e-6
# The share of the cache that holds the tensors of a kernel, and not other data.
CACHED = 0.8
# The largest of several limits counts most, but limits that are close add up: (a⁴ + b⁴ + c⁴)^¼.
_POWER = 4
# torch, in tensors of x's size. Forward: statistics x; normalization x, y; ReLU y, y. Backward: ReLU dy, y, dz; sums
# dz, x; gradient dz, x, dx. With an addition, forward reads a sum's two tensors and writes one.
TORCH_PASSES, TORCH_ADDITION, TORCH_LAUNCHES = 13, 3, 6


@dataclass(frozen=True)
class Expected:
    """The expected time of a step, in seconds, and what it follows from.

    Attributes:
        seconds: Of all launches, captured in a graph.
        floor: Of reading and writing every tensor once.
        torch: Of torch's passes over memory.
        launches: Number.
        bytes: Read from and written to memory.
        instructions: Of all warps.
        limit: What limits the launch that takes longest.
    """

    seconds: float
    floor: float
    torch: float
    launches: int
    bytes: float
    instructions: float
    limit: str


@dataclass(frozen=True)
class Work:
    """The work of one launch, independent of the device's speed.

    Attributes:
        launch: The launch.
        registers: Of a thread.
        instructions: Of a warp.
        waits: How often a thread waits for loads.
    """

    launch: Launch
    registers: int
    instructions: float
    waits: float

    @classmethod
    def of(cls, launch: Launch) -> Work:
        """Return the work of a launch."""
        cubin = launch.kernel.asm["cubin"]
        registers, _ = sass.resources(cubin)
        once, loop = sass.disassembled(cubin)
        if not loop.instructions:
            return cls(launch, registers, once.instructions, 1.0)
        tensors = launch.tensors()[0] or merged(launch)
        padded = sum(t.nbytes for t in tensors) * (padding(launch) if launch.tensors()[0] else 1.0)
        iterations = padded / (loop.loaded * 32 * launch.warps * launch.programs)
        return cls(launch, registers, once.instructions + loop.instructions * iterations, 1.0 + iterations)


def merged(launch: Launch) -> list[torch.Tensor]:
    """Return the partial results that a launch writes and merges, or only merges."""
    parts = launch.arguments.get("parts_ptr")
    return [] if parts is None else [parts]


class Cache:
    """The tensors that the kernels of one direction have read, most of whose values may still be in the cache.

    The second kernel reads in the opposite order and gives up a value once it has read it. It therefore finds the
    values that the first kernel read last, as many as the cache holds.

    Args:
        size: Bytes for these tensors.
    """

    def __init__(self, size: float) -> None:
        self._size = size
        self._read: set[int] = set()

    def missed(self, tensors: list[torch.Tensor]) -> float:
        """Return the bytes of these tensors that a kernel reads from memory, and note that it has read them."""
        again = sum(t.nbytes for t in tensors if id(t) in self._read)
        self._read.update(map(id, tensors))
        return sum(t.nbytes for t in tensors) - min(again, self._size)


def limits_of(work: Work, device: Device, nbytes: float) -> dict[str, float]:
    """Return the seconds that each limit allows a launch that moves this many bytes."""
    launch = work.launch
    rate = ISSUED * device.schedulers * device.clock  # of one multiprocessor
    held = device.resident(launch.warps, work.registers, launch.kernel.metadata.shared)
    of_program = launch.warps * work.instructions / rate
    waves = math.ceil(launch.programs / (device.processors * held))
    return {
        "memory": nbytes / (MEMORY * device.bandwidth),
        "instructions": of_program * math.ceil(launch.programs / device.processors),
        "latency": waves * (work.waits * LATENCY + of_program),
    }


def together(limits: dict[str, float]) -> float:
    """Return the time under several limits."""
    largest = max(limits.values())
    return largest * sum((t / largest) ** _POWER for t in limits.values()) ** (1 / _POWER)


def expected(case: Case, device: Device) -> Expected:
    """Return the expected time of a training step on a device."""
    with launches(device.architecture, device.processors) as found:
        training_step(case)
    seconds = instructions = moved = 0.0
    slowest = (0.0, "")
    caches = {backward: Cache(CACHED * device.cache) for backward in (False, True)}
    for launch in found:
        work = Work.of(launch)
        read, written = launch.tensors()
        nbytes = caches["dy_ptr" in launch.arguments].missed(read) + sum(t.nbytes for t in (*written, *merged(launch)))
        limits = limits_of(work, device, nbytes)
        time = together(limits) + GAP
        slowest = max(slowest, (time, max(limits, key=lambda name, limits=limits: limits[name])))  # type: ignore[misc]
        seconds, moved = seconds + time, moved + nbytes
        instructions += launch.programs * launch.warps * work.instructions
        if launch.arguments.get("counters_ptr") is not None:
            seconds += GAP  # a captured graph first sets the counters to 0
    passes = TORCH_PASSES + TORCH_ADDITION * case.residual
    return Expected(
        seconds,
        case.least_traffic * case.nbytes / device.bandwidth,
        passes * case.nbytes / (MEMORY * device.bandwidth) + (TORCH_LAUNCHES + case.residual) * GAP,
        len(found),
        moved,
        instructions,
        slowest[1],
    )
