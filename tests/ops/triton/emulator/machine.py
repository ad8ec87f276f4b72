"""Runs the programs of a launch, all threads at once in arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from tests.ops.triton.emulator.faults import Fault, Unsupported
from tests.ops.triton.emulator.instructions import accesses, warps
from tests.ops.triton.emulator.instructions.accesses import Step
from tests.ops.triton.emulator.instructions.arithmetic import meaning
from tests.ops.triton.emulator.lanes import Array, Lanes, Mask, dtype
from tests.ops.triton.emulator.memory.bytes import Memory
from tests.ops.triton.emulator.memory.copies import Copies
from tests.ops.triton.emulator.memory.order import Order
from tests.ops.triton.emulator.memory.regions import Regions
from tests.ops.triton.emulator.ptx import Instruction, Kernel
from tests.ops.triton.emulator.schedule import Schedule

_BARRIERS, _JUMPS = ("bar.sync",), ("bra", "bra.uni", "ret", "exit")


class Machine:
    """Programs of a launch that run at the same time.

    Args:
        kernel: The kernel.
        shared: Bytes of shared memory of a program.
        parameters: The values of the kernel's parameters, by name.
        regions: Global memory.
        order: The order of accesses in the whole launch.
        places: The programs to run, by their places in the launch.
        programs: The programs to run, by their numbers in the grid.
        grid: The number of programs in the grid.
        schedule: Which threads run next.
    """

    def __init__(
        self, kernel: Kernel, shared: int, parameters: Mapping[str, int], regions: Regions, order: Order,
        places: Array, programs: Array, grid: int, schedule: Schedule,
    ) -> None:  # fmt: skip
        self._kernel, self._shared_size, self._schedule = kernel, shared, schedule
        self.parameters, self.regions, self.order = parameters, regions, order
        self._places, self._end = places, len(kernel.code)
        self.lanes = Lanes(kernel, programs, grid)
        self.warps = order.warps_of(places)
        self.shared = _shared_memory(kernel, shared, len(programs))
        self.copies = Copies(self.shared, self.lanes.count)
        self._all = np.arange(self.lanes.count)
        self._steps: list[Step | None] = [None] * len(kernel.code)
        self._at = np.zeros(self.lanes.count, np.int64)  # the next instruction of each thread
        self._waiting = np.zeros(self.lanes.count, np.bool_)  # at a barrier

    def chosen(self, mask: Mask) -> Array:
        """Return the active lanes."""
        return self._all if mask is None else np.flatnonzero(mask)

    def in_shared(self, at: Array, lanes: Array, size: int) -> Array:
        """Return offsets in the shared memory of all programs."""
        if len(at) and (at.min() < 0 or at.max() + size > self._shared_size):
            raise Fault(
                f"accesses shared memory out of bounds: {size} bytes between {at.min()} and {at.max()} of "
                f"{self._shared_size} bytes"
            )
        if (at % size).any():
            raise Fault(f"accesses {size} bytes at the misaligned address {at[at % size != 0][0]} of shared memory")
        return at.astype(np.int64) + self.lanes.programs[lanes] * padded(self._shared_size)

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            Fault: the kernel does what a device does not allow.
            Unsupported: it uses an instruction that the emulator does not know.
        """
        with np.errstate(all="ignore"):
            if self._schedule.together:
                self._run_together(0)
            while (ready := self._ready()).any():
                if self._schedule.together and ready.all() and (self._at == self._at[0]).all():
                    self._run_together(int(self._at[0]))
                else:
                    self._run_apart(ready)
        if self._waiting.any():
            raise Fault(f"{self._kernel.name}: threads wait at a barrier that other threads never reach.")

    def _ready(self) -> Array:
        """Return the threads that can run."""
        ready: Array = ~self._waiting & (self._at < self._end)
        return ready

    def _run_together(self, at: int) -> None:
        """Run all threads from one instruction on, until they go different ways or end."""
        following: int | None = at
        while following is not None and following < self._end:
            following = self._execute(following, None)
        if following is not None:
            self._at[:] = following

    def _run_apart(self, ready: Array) -> None:
        """Run the threads that the schedule chooses, those with the earliest instruction first."""
        chosen, steps = self._schedule.choose(ready, self.lanes)
        for _ in range(steps):
            runs = chosen & self._ready()
            if not runs.any():
                break
            at = int(self._at.min(where=runs, initial=self._end))
            active = runs & (self._at == at)
            following = self._execute(at, active)
            if following is not None:
                self._at[active] = following
                if self._schedule.together and active.all():
                    break

    def _execute(self, at: int, active: Mask) -> int | None:
        """Execute an instruction.

        Return the next instruction of the active threads, or None if they go different ways, which `_at` then has.
        """
        instruction = self._kernel.code[at]
        try:
            mask = self._guarded(instruction, active)
            if mask is not None and not mask.any():
                return at + 1
            if instruction.operation in _JUMPS:
                return self._go(self._target(instruction), at + 1, mask, active)
            if instruction.operation in _BARRIERS:
                return self._wait(instruction, at + 1, mask, active)
            step = self._steps[at]
            if step is None:
                step = self._steps[at] = self._bind(instruction)
            step(mask)
        except Fault as fault:
            raise Fault(f"{self._kernel.name}: {instruction} {fault}.") from None
        except Unsupported as error:
            raise Unsupported(f"{self._kernel.name}: {instruction}: {error}") from None
        return at + 1

    def _guarded(self, instruction: Instruction, active: Mask) -> Mask:
        """Return the active threads for which the instruction's guard is true."""
        if instruction.guard is None:
            return active
        guard = self.lanes.read(instruction.guard, "pred")
        mask = ~guard if instruction.negated else guard.copy()
        if active is not None:
            return mask & active
        return None if mask.all() else mask

    def _target(self, instruction: Instruction) -> int:
        if instruction.operation in ("ret", "exit"):
            return self._end
        return self._kernel.labels[instruction.operands[0]]

    def _go(self, target: int, following: int, mask: Mask, active: Mask) -> int | None:
        """Continue at `target` where the mask is true, and at `following` elsewhere."""
        if mask is None or (active is not None and (mask == active).all()):
            return target
        self._at[self.chosen(active)] = following
        self._at[mask] = target
        return None

    def _wait(self, instruction: Instruction, following: int, mask: Mask, active: Mask) -> int | None:
        """Wait until all threads of a program have arrived."""
        if instruction.operands != ("0",):
            raise Unsupported("The emulator knows only the barrier 0 for all threads.")
        if mask is None:
            self.order.barrier(self._places.tolist())
            return following
        self._at[self.chosen(active)] = following
        self._waiting |= mask
        complete = self._waiting.reshape(-1, self.lanes.threads).all(1)
        arrived = np.repeat(complete, self.lanes.threads)
        at = self._at.reshape(-1, self.lanes.threads)[complete]
        if (at != at[:, :1]).any():
            raise Fault("is a barrier at which threads wait while others of their program wait at another")
        self._waiting &= ~arrived
        self.order.barrier(self._places[complete].tolist())
        return None

    def _bind(self, instruction: Instruction) -> Step:
        """Return what an instruction does, with its operands found."""
        for bind in (_bind_move, _bind_computation, accesses.bind, warps.bind):
            step = bind(self, instruction)
            if step is not None:
                return step
        raise Unsupported("The emulator does not know this instruction.")


def _shared_memory(kernel: Kernel, size: int, programs: int) -> Memory:
    """Return the shared memory of all programs, each with the same number of bytes."""
    widths = [
        int(width) // 8
        for i in kernel.code
        if ".shared" in i.operation
        for width in re.findall(r"\.[bsuf](8|16|32|64)$", i.operation)
    ]
    granule = min(widths, default=4)
    count = programs * padded(size)
    shared = Memory(np.full(count, 0xFF, np.uint8), granule, np.zeros(-(-count // granule), np.bool_))
    shared.arriving = np.zeros(-(-count // granule), np.bool_)
    return shared


def padded(size: int) -> int:
    """Return the distance between the shared memories of two programs, which keeps addresses aligned."""
    return -(-size // 128) * 128


def _bind_computation(machine: Machine, instruction: Instruction) -> Step | None:
    found = meaning(instruction.operation)
    if found is None:
        return None
    target, *operands = instruction.operands
    if len(operands) != len(found.inputs):
        raise Unsupported(f"The emulator expects {len(found.inputs)} operands, got {len(operands)}.")
    inputs = [machine.lanes.read(operand, kind) for operand, kind in zip(operands, found.inputs, strict=True)]
    function, writes = found.function, [machine.lanes.target(name, found.output) for name in target.split("|")]
    if len(writes) != found.results:
        raise Unsupported(f"The emulator expects {found.results} results, got {len(writes)}.")
    if found.results == 1:
        return lambda mask: writes[0](function(*inputs), mask)

    def compute(mask: Mask) -> None:
        for write, result in zip(writes, function(*inputs), strict=True):
            write(result, mask)

    return compute


def _bind_move(machine: Machine, instruction: Instruction) -> Step | None:
    """Return a `mov` that splits a register into parts, the lowest first, or joins parts."""
    if not instruction.operation.startswith("mov.") or "{" not in instruction.text:
        return None
    kind = instruction.operation.removeprefix("mov.")
    whole = dtype(kind)
    target, source = instruction.operands
    parts = accesses.names(target if target.startswith("{") else source)
    part = f"b{8 * whole.itemsize // len(parts)}"
    if target.startswith("{"):
        value, writes = machine.lanes.read(source, kind), [machine.lanes.target(name, part) for name in parts]

        def split(mask: Mask) -> None:
            pieces = np.ascontiguousarray(value).view(dtype(part)).reshape(-1, len(parts))
            for i, write in enumerate(writes):
                write(pieces[:, i], mask)

        return split
    values, write = [machine.lanes.read(name, part) for name in parts], machine.lanes.target(target, kind)
    return lambda mask: write(np.stack(values, 1).view(whole)[:, 0], mask)
