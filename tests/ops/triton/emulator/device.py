"""The emulated device: it loads kernels and launches them on tensors in the memory of the CPU."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tests.ops.triton.emulator import ptx
from tests.ops.triton.emulator.faults import Unsupported
from tests.ops.triton.emulator.machine import Machine
from tests.ops.triton.emulator.memory.allocations import Allocations
from tests.ops.triton.emulator.memory.order import Order
from tests.ops.triton.emulator.memory.regions import Regions
from tests.ops.triton.emulator.schedule import Schedule

_FORMATS = {
    "fp32": "f", "f32": "f", "fp64": "d", "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B",
    "u16": "H", "u32": "I", "u64": "Q",
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A kernel on the device, and the bytes of shared memory of each of its programs."""

    kernel: ptx.Kernel
    shared: int


@dataclass(frozen=True)
class Argument:
    """An argument of a launch, with its type in Triton."""

    name: str
    kind: str
    value: Tensor | float


class Device:
    """A GPU whose memory are the tensors on the CPU.

    Args:
        schedule: The order of programs and threads.
        programs: Which programs of a kernel's grid run; all by default.
    """

    def __init__(
        self, schedule: Schedule | None = None, programs: Callable[[str, int], Sequence[int]] | None = None
    ) -> None:
        self.allocations = Allocations()
        self.schedule = Schedule() if schedule is None else schedule
        self.programs = programs or (lambda name, grid: range(grid))
        self.launches: Counter[str] = Counter()  # by the kernel's name

    def load(self, text: str, shared: int) -> Loaded:
        return Loaded(ptx.parse(text), shared)

    def launch(self, loaded: Loaded, grid: int, arguments: Sequence[Argument]) -> None:
        """Run a kernel to its end.

        Raises:
            Fault: the kernel does what a device does not allow, or what depends on chance there.
            Unsupported: the emulator does not know an instruction.
        """
        kernel, regions = loaded.kernel, Regions()
        self.launches[kernel.name] += 1
        values = [self._bits(regions, argument) for argument in arguments]
        values += [0] * (
            len(kernel.parameters) - len(values)
        )  # scratch memory, which Triton adds and does not use here
        parameters = dict(zip(kernel.parameters, values, strict=True))
        programs = np.array(self.programs(kernel.name, grid), np.int64)
        order = Order(sum(self.launches.values()), programs.tolist(), kernel.threads)
        for places in self.schedule.batches(len(programs), kernel.threads):
            Machine(
                kernel, loaded.shared, parameters, regions, order, places, programs[places], grid, self.schedule
            ).run()  # fmt: skip
        regions.end_launch()

    def _bits(self, regions: Regions, argument: Argument) -> int:
        """Return an argument as the kernel gets it."""
        if isinstance(argument.value, Tensor):
            return regions.add(self.allocations.region(argument.name, argument.value))
        if argument.kind not in _FORMATS:
            raise Unsupported(f"The emulator does not know the type {argument.kind} of the argument {argument.name}.")
        return int.from_bytes(struct.pack("<" + _FORMATS[argument.kind], argument.value), "little")
