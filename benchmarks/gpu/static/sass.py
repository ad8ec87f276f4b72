"""Read a kernel's machine code: its registers, its memory, and the instructions that a warp executes.

The path of a warp is estimated without values: of all paths, the one that moves the most bytes between registers and
global memory, and of those the shortest. It enters each loop once, takes full tiles rather than masked ones, and skips
the slow paths of divisions and square roots, which only denormal and huge numbers take.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_LOADS, _STORES = ("LDG", "LDGSTS"), ("STG",)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Cost:
    """Instructions of a warp, and the bytes that each of its threads loads from and stores to global memory."""

    instructions: int = 0
    loaded: int = 0
    stored: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.instructions + other.instructions, self.loaded + other.loaded, self.stored + other.stored)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.instructions - other.instructions, self.loaded - other.loaded, self.stored - other.stored)

    @property
    def rank(self) -> tuple[int, int]:
        """Return what a path is chosen by: the most bytes, then the fewest instructions."""
        return self.loaded + self.stored, -self.instructions


@dataclass
class _Block:
    """Instructions without a branch between them: where they may jump, whether the next may follow, or the end."""

    cost: Cost = Cost()
    target: str | None = None
    falls: bool = True
    exits: bool = False


def resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread of a compiled CUDA kernel, and the bytes that it spills to memory."""
    text = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def disassembled(cubin: bytes) -> tuple[Cost, Cost]:
    """Return `costs` of a compiled CUDA kernel; nvdisasm takes 0.4 s."""
    return costs(_tool(knobs.nvidia.nvdisasm.path, "-c", cubin))


@functools.cache
def _tool(path: str, option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "kernel.cubin")
        file.write_bytes(cubin)
        return subprocess.run([path, option, file], capture_output=True, text=True, check=True).stdout


def costs(sass: str) -> tuple[Cost, Cost]:
    """Return the cost outside the main loop and that of one of its iterations, from the text of nvdisasm."""
    blocks, following = _graph(sass)
    whole = _best(blocks, following, 0, {i for i, block in enumerate(blocks) if block.exits})
    if whole is None:
        raise ValueError("nvdisasm's text must hold a kernel with a path to an EXIT instruction, but it holds none.")
    loop = _main_loop(blocks, following)
    return whole - loop, loop


def _main_loop(blocks: list[_Block], following: list[list[int]]) -> Cost:
    """Return the cost of an iteration of the innermost loop that loads the most; zero if no loop loads anything."""
    loops = {(head, tail) for tail, successors in enumerate(following) for head in successors if head <= tail}
    innermost = [
        (head, tail) for head, tail in loops if not any(head <= a and b <= tail for a, b in loops - {(head, tail)})
    ]
    found = (_best(blocks, following, head, {tail}) for head, tail in innermost)
    best = max((cost for cost in found if cost is not None), key=lambda cost: cost.rank, default=Cost())
    return best if best.loaded else Cost()


def _best(blocks: list[_Block], following: list[list[int]], first: int, ends: Collection[int]) -> Cost | None:
    """Return the cost of a warp's path from a block to the end of one of `ends`, without going back."""
    best: dict[int, Cost] = {}
    for i in range(max(ends, default=-1), first - 1, -1):
        onwards = [best[n] for n in following[i] if n > i and n in best] + [Cost()] * (i in ends)
        if onwards:
            best[i] = blocks[i].cost + max(onwards, key=lambda cost: cost.rank)
    return best.get(first)


def _graph(sass: str) -> tuple[list[_Block], list[list[int]]]:
    """Divide the code into blocks at labels and branches; return them, and the positions of those that can follow."""
    blocks: list[_Block] = []
    labels: dict[str, int] = {}
    new = True
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]], new = len(blocks), True
        if found := _INSTRUCTION.search(line):
            if new:
                blocks.append(_Block())
            new = _add(blocks[-1], *found.groups())
    following = [
        [labels[t] for t in (block.target,) if t in labels] + [i + 1] * (block.falls and i + 1 < len(blocks))
        for i, block in enumerate(blocks)
    ]
    return blocks, following


def _add(block: _Block, predicate: str | None, opcode: str, operands: str) -> bool:
    """Add an instruction to a block; return whether the block ends with it."""
    name, *modifiers = opcode.split(".")
    width = next((_BYTES[m] for m in modifiers if m in _BYTES), 4)
    block.cost += Cost(1, width * (name in _LOADS), width * (name in _STORES))
    if name == "BRA":
        target = _TARGET.search(operands)
        block.target = target and target[1]
        block.falls = predicate is not None or not operands.strip().startswith("`")
    elif name in ("EXIT", "RET") and predicate is None:
        block.falls, block.exits = False, name == "EXIT"
    return name == "BRA" or not block.falls
