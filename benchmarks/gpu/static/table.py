"""Registers, memory and instructions a value of the kernels of a training step, and their limits."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import triton

from batchnorm.files import write_whole
from benchmarks.gpu.layers import Case
from benchmarks.gpu.static import sass
from benchmarks.gpu.static.compiling import Launch, launches, training_step
from benchmarks.measuring.records import Row
from benchmarks.subjects import cases

RESULTS = Path(__file__).parents[2] / "results"
TABLE, LIMITS = "gpu_static.csv", "gpu_limits.csv"
KEY = ("architecture", "kernel", "shape", "layout", "dtype")
LIMITED = ("registers", "spilled_bytes", "instructions_a_value")

# Rows of 56, 14 and 7 values, and the largest channels of 7×7 that ResNet-50 has at batch 256.
SHAPES = ((32, 256, 56, 56), (32, 1024, 14, 14), (32, 2048, 7, 7), (256, 2048, 7, 7))
# Of H100 and H200, of A100, and of L4.
ARCHITECTURES = ("sm_90", "sm_80", "sm_89")


def table_cases() -> list[Case]:
    """Return the cases of the table."""
    return [Case(shape, layout, dtype, False) for shape in SHAPES for layout in cases.LAYOUTS for dtype in cases.DTYPES]


def instructions_a_value(launch: Launch, once: sass.Cost, loop: sass.Cost) -> float:
    """Return a thread's instructions for each value, in the main loop or, without a loop, in the whole program.

    Values that a tile has beyond the tensor's count as work, not as values.
    """
    read, written = launch.tensors()
    if not loop.instructions:
        return once.instructions * 32 * launch.warps * launch.programs / (read or written)[0].numel()
    each = loop.loaded / sum(t.itemsize for t in read)
    return loop.instructions / each * padding(launch)


def padding(launch: Launch) -> float:
    """Return the values of all tiles over those of the tensor, for programs that loop over tiles."""
    a = launch.arguments
    if a["GROUP"]:
        return a["B1"] / (a["GROUP"] * a["positions"])
    return _padded(a["channels"], a["B1"]) / a["channels"] if a["ROWS"] else 1.0


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block


def rows(architecture: str, wanted: list[Case], *, count: bool = True) -> Iterator[Row]:
    """Compile the kernels of these cases, and yield a row for each kernel that reads or writes a tensor of x's shape.

    Args:
        architecture: Such as `sm_90`.
        wanted: The cases.
        count: Whether to count instructions, which takes as long as compiling.
    """
    for case in wanted:
        with launches(architecture) as found:
            training_step(case)
        for launch in found:
            if any(launch.tensors()):
                yield _row(architecture, case, launch) | (_counts(launch) if count else {})


def _row(architecture: str, case: Case, launch: Launch) -> Row:
    registers, spilled = sass.resources(launch.kernel.asm["cubin"])
    return {
        "architecture": architecture,
        "kernel": launch.name,
        "shape": cases.shape_text(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "triton": triton.__version__,
        "programs": launch.programs,
        "warps": launch.warps,
        "shared_bytes": launch.kernel.metadata.shared,
        "registers": registers,
        "spilled_bytes": spilled,
    }


def _counts(launch: Launch) -> Row:
    once, loop = sass.disassembled(launch.kernel.asm["cubin"])
    return {
        "instructions_a_value": round(instructions_a_value(launch, once, loop), 1),
        "instructions_in_loop": loop.instructions,
        "instructions_outside": once.instructions,
    }


def key_of(row: Row) -> tuple[str, ...]:
    """Return what identifies a row of the table, and of the limits."""
    return tuple(str(row[k]) for k in KEY)


def exceeded(found: list[Row], limits: list[Row]) -> list[str]:
    """Return a line for each value above its limit, with both, and for each kernel without limits."""
    known = {key_of(row): row for row in limits}
    lines = []
    for row in found:
        limit = known.get(key_of(row))
        if limit is None:
            lines.append(f"{' '.join(key_of(row))}: no limits")
            continue
        lines += [
            f"{' '.join(key_of(row))}: {row[name]} {name}, the limit is {limit[name]}"
            for name in LIMITED
            if name in row and float(row[name]) > float(limit[name])
        ]
    return lines


def limits_of(found: list[Row]) -> list[Row]:
    """Return limits slightly above these rows: the next multiple of 8 registers, and 5 % more instructions."""
    return [
        {
            **{k: row[k] for k in KEY},
            "registers": -(-row["registers"] // 8) * 8,
            "spilled_bytes": row["spilled_bytes"],
            "instructions_a_value": round(1.05 * row["instructions_a_value"], 1),
        }
        for row in found
    ]


def write(path: Path, found: list[Row]) -> None:
    """Write rows as a CSV file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    write_whole(path, text.getvalue())
