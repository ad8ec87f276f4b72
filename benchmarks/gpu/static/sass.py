"""Read a kernel's machine code: its registers, its memory, and the instructions that a warp executes.

The path of a warp is estimated without values. In the main loop, and in a kernel without one, it is the path that moves
the most bytes between registers and global memory, and of those the shortest. Around the main loop it is the shortest.
It therefore skips masked tiles, of which only the last program has one, and the slow paths of divisions and square
roots, which only denormal and huge numbers take.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    exits = {i for i, block in enumerate(blocks) if block.exits}
    if not exits:
        raise ValueError("nvdisasm's text must hold a kernel with an EXIT instruction, but it holds none.")
    loop = _main_loop(blocks, following)
    if loop is None:
        return _path(blocks, following, 0, exits, _most_bytes) or Cost(), Cost()
    head, tail, each = loop
    before = (_path(blocks, following, 0, {head}, _shortest) or Cost()) - blocks[head].cost
    left = {n for successors in following[head : tail + 1] for n in successors if n > tail}
    after = [path for n in left if (path := _path(blocks, following, n, exits, _shortest))]
    return before + max(after, key=_shortest, default=Cost()), each


def _most_bytes(cost: Cost) -> tuple[int, int]:
    return cost.loaded + cost.stored, -cost.instructions


def _shortest(cost: Cost) -> int:
    return -cost.instructions


def _main_loop(blocks: list[_Block], following: list[list[int]]) -> tuple[int, int, Cost] | None:
    """Return the first and the last block of the loop that loads the most, and the cost of an iteration.

    Loops in loops and those around them do not count: they merge partial results.
    """
    loops = {(head, tail) for tail, successors in enumerate(following) for head in successors if head <= tail}
    alone = [
        (head, tail)
        for head, tail in loops
        if not any((head <= a and b <= tail) or (a <= head and tail <= b) for a, b in loops - {(head, tail)})
    ]
    found = ((head, tail, _path(blocks, following, head, {tail}, _most_bytes)) for head, tail in alone)
    loading = ((head, tail, path) for head, tail, path in found if path and path.loaded)
    return max(loading, key=lambda loop: _most_bytes(loop[2]), default=None)


def _path(
    blocks: list[_Block],
    following: list[list[int]],
    first: int,
    ends: Collection[int],
    rank: Callable[[Cost], Any],
) -> Cost | None:
    """Return the cost of the path of the highest rank from a block to the end of one of `ends`, without going back."""
    best: dict[int, Cost] = {}
    for i in range(max(ends), first - 1, -1):
        onwards = [best[n] for n in following[i] if n > i and n in best] + [Cost()] * (i in ends)
        if onwards:
            best[i] = blocks[i].cost + max(onwards, key=rank)
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
