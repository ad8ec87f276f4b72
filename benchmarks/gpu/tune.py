"""Find the fastest settings for each class of tensors, and write the kernels' table."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from batchnorm.ops.triton import table
from batchnorm.ops.triton.settings import CANDIDATES, Settings
from batchnorm.ops.triton.table import TABLE
from benchmarks.gpu.layers import OURS, Case, measure
from benchmarks.gpu.timing import Clock, Deadline
from benchmarks.reports.targets import geometric_mean

PATH = Path(table.__file__)
# Large and streamed; small channels; held by one program; rows of 49 values.
SHAPES = ((32, 64, 112, 112), (256, 256, 56, 56), (32, 1024, 14, 14), (256, 2048, 7, 7))
# A candidate must be faster by this factor: two runs of the same settings differ by slightly less.
_FASTER = 0.99

_TEXT = '''"""The settings of each class of tensors; `python -m benchmarks gpu --tune` measures and writes them.

{origin}
"""

from batchnorm.ops.triton.settings import Settings

# The keys: whether channels are innermost, and the bytes of a value.
TABLE = {{
{lines}
}}
'''


def text(settings: dict[tuple[bool, int], Settings], origin: str) -> str:
    """Return the table as a Python module."""
    lines = []
    for key, chosen in sorted(settings.items()):
        fields = ", ".join(f"{name}={getattr(chosen, name)}" for name in CANDIDATES)
        lines.append(f"    {key}: Settings({fields}),")
    return _TEXT.format(origin=origin, lines="\n".join(lines))


def _milliseconds(cases: list[Case], clock: Clock) -> float:
    """Return our mean time with the current table; infinite if a kernel does not run."""
    try:
        return geometric_mean(measure(case, clock, OURS, 1e12, 5)["ms"] for case in cases)
    except Exception as error:  # such as too much shared memory
        print(f"  does not run: {type(error).__name__}: {error}")
        return float("inf")


def tune(clock: Clock, deadline: Deadline, shapes: tuple[tuple[int, int, int, int], ...] = SHAPES) -> bool:
    """Put the fastest candidates into the table, field by field; return whether there was time to try all."""
    for rows, itemsize in TABLE:
        layout, dtype = ("contiguous", "channels-last")[rows], {2: "bfloat16", 4: "float32"}[itemsize]
        cases = [Case(shape, layout, dtype, False) for shape in shapes]
        before, best = TABLE[rows, itemsize], _milliseconds(cases, clock)
        print(f"{layout} {dtype}: {best:.4f} ms with {before}")
        for field, candidates in CANDIDATES.items():
            if field == "row_bytes" and not rows:
                continue
            base = TABLE[rows, itemsize]
            for value in candidates:
                if deadline.passed():
                    return False
                if value == getattr(base, field):
                    continue
                kept, TABLE[rows, itemsize] = TABLE[rows, itemsize], dataclasses.replace(base, **{field: value})
                found = _milliseconds(cases, clock)
                print(f"  {field} {value}: {found:.4f} ms", flush=True)
                if found < _FASTER * best:
                    best = found
                else:
                    TABLE[rows, itemsize] = kept
    return True
