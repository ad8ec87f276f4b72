"""Instructions that access global and shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from tests.ops.triton.emulator.faults import Fault, Unsupported
from tests.ops.triton.emulator.lanes import Array, Mask, dtype, unsigned
from tests.ops.triton.emulator.memory.bytes import Memory
from tests.ops.triton.emulator.ptx import Instruction

if TYPE_CHECKING:
    from tests.ops.triton.emulator.machine import Machine

Step = Callable[[Mask], None]

_HINTS = r"(?:\.(?:L[12]::\w+|ca|cg|cs|cv|wb|wt|nc|lu))*"  # they change no result
_STRONG = r"((?:\.(?:weak|volatile|relaxed|acquire|release|acq_rel|cta|gpu|sys))*)"
_LOAD_OR_STORE = re.compile(rf"(ld|st){_STRONG}\.(global|shared)(?:::cta)?{_HINTS}(?:\.v([248]))?\.([bsuf]\d+)")
_ATOMIC = re.compile(rf"atom\.global{_STRONG}\.(add|exch|cas|and|or|xor|min|max)\.([bsu]\d+)")
_COPY = re.compile(rf"cp\.async\.c[ag]\.shared(?:::cta)?\.global{_HINTS}")
_PARAMETER = re.compile(r"ld\.param\.([bsuf]\d+)")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")

_UPDATES: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "exch": lambda old, new: new, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def bind(machine: Machine, instruction: Instruction) -> Step | None:
    """Return what an instruction does for the active threads, or None if it does not access memory."""
    operation = instruction.operation
    if found := _PARAMETER.fullmatch(operation):
        return _parameter(machine, instruction, found[1])
    if found := _LOAD_OR_STORE.fullmatch(operation):
        make = _load if found[1] == "ld" else _store
        return make(machine, instruction, *found.groups()[1:])
    if found := _ATOMIC.fullmatch(operation):
        return _atomic(machine, instruction, *found.groups())
    if _COPY.fullmatch(operation):
        return _copy(machine, instruction)
    if operation.startswith("createpolicy.fractional."):  # a hint for caches
        return lambda mask: machine.lanes.write(instruction.operands[0], "b64", np.zeros(1, np.uint64), mask)
    return _without_address(machine, instruction)


def _without_address(machine: Machine, instruction: Instruction) -> Step | None:
    operation = instruction.operation
    if operation == "cp.async.commit_group":
        return lambda mask: machine.copies.commit(machine.chosen(mask))
    if operation in ("cp.async.wait_group", "cp.async.wait_all"):
        unfinished = int(instruction.operands[0]) if instruction.operands else 0
        return lambda mask: machine.copies.wait(machine.chosen(mask), unfinished, machine.order)
    if operation in ("fence.acq_rel.gpu", "fence.acq_rel.sys", "fence.sc.gpu", "membar.gl", "membar.sys"):
        return lambda mask: (
            [machine.order.fence(int(w)) for w in np.unique(machine.warps[machine.chosen(mask)])] and None
        )
    if operation in ("fence.acq_rel.cta", "membar.cta"):  # the emulator's threads of a program see one memory
        return lambda mask: None
    return None


def address(machine: Machine, operand: str, kind: str) -> Callable[[], Array]:
    found = _ADDRESS.fullmatch(operand)
    if found is None:
        raise Unsupported(f"The emulator expects an address, got {operand!r}.")
    base = machine.lanes.read(found[1], kind)
    offset = np.array(int(found[2] or "0", 0)).astype(base.dtype)
    return lambda: base + offset


def names(operand: str) -> list[str]:
    """Return the registers of an operand, which may be a list in braces."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def _parameter(machine: Machine, instruction: Instruction, kind: str) -> Step:
    target, source = instruction.operands
    value = machine.parameters[source.strip("[] ")]
    values = np.array([value % 2 ** (8 * dtype(kind).itemsize)], unsigned(kind)).view(dtype(kind))
    return lambda mask: machine.lanes.write(target, kind, values, mask)


def _find(
    machine: Machine, space: str, operand: str, size: int
) -> Callable[[Array], Iterator[tuple[Memory, Array, Array]]]:
    """Return a function of the active lanes that yields each memory they access, their positions, and offsets."""
    where = address(machine, operand, "u64" if space == "global" else "s32")
    if space == "shared":
        return lambda lanes: iter(
            [(machine.shared, np.arange(len(lanes)), machine.in_shared(where()[lanes], lanes, size))]
        )

    def find(lanes: Array) -> Iterator[tuple[Memory, Array, Array]]:
        for region, chosen, offsets in machine.regions.find(where()[lanes], size):
            yield region.memory, chosen, offsets

    return find


def _load(machine: Machine, instruction: Instruction, strength: str, space: str, vector: str | None, kind: str) -> Step:
    targets, width = names(instruction.operands[0]), dtype(kind).itemsize
    size = width * int(vector or 1)
    find = _find(machine, space, instruction.operands[1], size)

    def load(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        values = np.zeros((machine.lanes.count, len(targets)), f"u{width}")
        for memory, chosen, at in find(lanes):
            at_lanes = lanes[chosen]
            if _is_strong(strength):
                _synchronize(machine, strength, memory, at, at_lanes, size)
                values[at_lanes] = memory.bits(at, size, width)
            else:
                values[at_lanes] = memory.read(at, size, width, machine.warps[at_lanes], machine.order)
        for i, target in enumerate(targets):
            machine.lanes.write(target, kind, values[:, i].copy().view(dtype(kind)), mask)

    return load


def _store(
    machine: Machine, instruction: Instruction, strength: str, space: str, vector: str | None, kind: str
) -> Step:
    bits = unsigned(kind)
    sources = [machine.lanes.read(name, f"b{8 * bits.itemsize}") for name in names(instruction.operands[1])]
    size = bits.itemsize * int(vector or 1)
    find = _find(machine, space, instruction.operands[0], size)

    def store(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        for memory, chosen, at in find(lanes):
            at_lanes = lanes[chosen]
            values = np.stack([source[at_lanes] for source in sources], 1)
            if _is_strong(strength):
                memory.store(at, values)
                _synchronize(machine, strength, memory, at, at_lanes, size)
            else:
                memory.write(at, values, machine.warps[at_lanes], machine.order)

    return store


def _is_strong(strength: str) -> bool:
    return strength not in ("", ".weak")


def _synchronize(machine: Machine, strength: str, memory: Memory, at: Array, lanes: Array, size: int) -> None:
    """Record strong accesses, and what they order."""
    order, warps = machine.order, machine.warps[lanes]
    memory.access_strongly(at, size, warps, order)
    if ".cta" in strength:
        return
    for warp, offset in zip(warps.tolist(), at.tolist(), strict=True):
        place = id(memory), offset
        order.relaxed(warp, place)
        if ".acq" in strength:
            order.acquire(warp, place)
        if ".release" in strength or ".acq_rel" in strength:
            order.release(warp, place)


def _atomic(machine: Machine, instruction: Instruction, strength: str, update: str, kind: str) -> Step:
    target, where, *operands = instruction.operands
    sources = [machine.lanes.read(name, kind) for name in operands]
    size = dtype(kind).itemsize
    find = _find(machine, "global", where, size)

    def change(memory: Memory, lane: int, at: Array) -> Array:
        old = memory.bits(at, size, size)[0].view(dtype(kind))
        values = [source[lane : lane + 1] for source in sources]
        new = np.where(old == values[0], values[1], old) if update == "cas" else _UPDATES[update](old, values[0])
        memory.store(at, new[:, None].view(unsigned(kind)))
        return old

    def atomic(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        results = np.zeros(machine.lanes.count, dtype(kind))
        for memory, chosen, offsets in find(lanes):
            for lane, at in zip(lanes[chosen].tolist(), offsets[:, None], strict=True):
                _synchronize(machine, strength or ".relaxed", memory, at, np.array([lane]), size)
                results[lane] = change(memory, lane, at)[0]
        machine.lanes.write(target, kind, results, mask)

    return atomic


def _copy(machine: Machine, instruction: Instruction) -> Step:
    target, source, size_text, *counts = instruction.operands
    size = int(size_text, 0)
    to, origin = _find(machine, "shared", target, size), _find(machine, "global", source, size)
    count = machine.lanes.read(counts[0] if counts else size_text, "u32")

    def copy(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        copied = count[lanes] > 0
        if (count[lanes][copied] != size).any():
            raise Fault("copies a part of an element, which the emulator does not support")
        values = np.zeros((len(lanes), size // 4), np.uint32)  # without a source, zeros are copied
        full = np.flatnonzero(copied)
        if len(full):
            for memory, chosen, at in origin(lanes[full]):
                warps = machine.warps[lanes[full[chosen]]]
                values[full[chosen]] = memory.read(at, size, 4, warps, machine.order)
        for _, _, at in to(lanes):
            machine.copies.start(at, values, lanes, machine.warps[lanes], machine.order)

    return copy
