"""Instructions that all threads of a warp execute together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from tests.ops.triton.emulator.faults import Fault, Unsupported
from tests.ops.triton.emulator.instructions.accesses import Step, address, names
from tests.ops.triton.emulator.lanes import WARP, Array, Mask
from tests.ops.triton.emulator.ptx import Instruction

if TYPE_CHECKING:
    from tests.ops.triton.emulator.machine import Machine

_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
_MATRIX = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16")
_ROW = 16  # bytes of a row of a matrix of 8 × 8 values


def bind(machine: Machine, instruction: Instruction) -> Step | None:
    """Return what an instruction does for the active warps, or None if it is not one of these."""
    operation = instruction.operation
    if found := _SHUFFLE.fullmatch(operation):
        return _whole(_shuffle(machine, instruction, found[1]))
    if found := _MATRIX.fullmatch(operation):
        make = _load_matrices if found[1] == "ld" else _store_matrices
        return _whole(make(machine, instruction, int(found[2]), found[3] is not None))
    if operation == "redux.sync.add.s32":
        return _whole(_sum(machine, instruction))
    if operation == "bar.warp.sync":
        return _whole(lambda mask: None)
    return None


def _whole(step: Step) -> Step:
    """Check that all threads of each warp take part."""

    def checked(mask: Mask) -> None:
        if mask is not None and (mask.reshape(-1, WARP).any(1) != mask.reshape(-1, WARP).all(1)).any():
            raise Fault("needs all threads of a warp, but only a part of them executes it")
        step(mask)

    return checked


def _require_all(members: Array) -> None:
    if (members != 2**WARP - 1).any():
        raise Unsupported("The emulator expects instructions for all threads of a warp, got others.")


def _shuffle(machine: Machine, instruction: Instruction, mode: str) -> Step:
    target, source, by, clamp, threads = instruction.operands
    members = machine.lanes.read(threads, "b32")
    if int(clamp, 0) not in (0, WARP - 1) or "|" in target:
        raise Unsupported(f"The emulator expects a shuffle within a whole warp, got {instruction}.")
    values, distance = machine.lanes.read(source, "b32"), machine.lanes.read(by, "s32")
    lanes = np.arange(machine.lanes.count)
    within, first = lanes % WARP, lanes - lanes % WARP

    def shuffle(mask: Mask) -> None:
        _require_all(members[machine.chosen(mask)])
        wanted = {
            "bfly": within ^ distance, "idx": distance & (WARP - 1), "up": within - distance, "down": within + distance
        }[mode]  # fmt: skip
        outside = (wanted < 0) | (wanted >= WARP)
        machine.lanes.write(target, "b32", values[first + np.where(outside, within, wanted)], mask)

    return shuffle


def _sum(machine: Machine, instruction: Instruction) -> Step:
    target, source, threads = instruction.operands
    values, members = machine.lanes.read(source, "s32"), machine.lanes.read(threads, "b32")

    def add(mask: Mask) -> None:
        _require_all(members[machine.chosen(mask)])
        totals = values.reshape(-1, WARP).sum(1, dtype=np.int32)
        machine.lanes.write(target, "s32", np.repeat(totals, WARP), mask)

    return add


def _rows_of(machine: Machine, where: Array, matrix: int, lanes: Array) -> tuple[Array, Array]:
    """Return the offsets of a matrix's rows in shared memory, which 8 threads of each warp give, and their warps."""
    giving = lanes.reshape(-1, WARP)[:, 8 * matrix : 8 * matrix + 8].ravel()
    return machine.in_shared(where[giving], giving, _ROW), machine.warps[giving]


def _load_matrices(machine: Machine, instruction: Instruction, number: int, transposed: bool) -> Step:
    targets, where = names(instruction.operands[0]), address(machine, instruction.operands[1], "s32")

    def load(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        for matrix in range(number):
            at, warps = _rows_of(machine, where(), matrix, lanes)
            rows = machine.shared.read(at, _ROW, 2, warps, machine.order).reshape(-1, 8, 8)
            values = np.zeros(machine.lanes.count, np.uint32)
            values[lanes] = np.ascontiguousarray(rows.swapaxes(1, 2) if transposed else rows).view(np.uint32).ravel()
            machine.lanes.write(targets[matrix], "b32", values, mask)

    return load


def _store_matrices(machine: Machine, instruction: Instruction, number: int, transposed: bool) -> Step:
    where = address(machine, instruction.operands[0], "s32")
    sources = [machine.lanes.read(name, "b32") for name in names(instruction.operands[1])]

    def store(mask: Mask) -> None:
        lanes = machine.chosen(mask)
        for matrix in range(number):
            at, warps = _rows_of(machine, where(), matrix, lanes)
            values = np.ascontiguousarray(sources[matrix][lanes]).view(np.uint16).reshape(-1, 8, 8)
            rows = np.ascontiguousarray(values.swapaxes(1, 2) if transposed else values).reshape(-1, 8)
            machine.shared.write(at, rows, warps, machine.order)

    return store
