"""Launches that are prepared once for each tiling, and the memory that programs share.

Importing this module imports Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from batchnorm.ops.triton import tiling
from batchnorm.ops.triton.counters import counters
from batchnorm.ops.triton.frame import Frame
from batchnorm.ops.triton.kernels import finish
from batchnorm.ops.triton.tiling import Tiling
from batchnorm.ops.triton.variants import Kernel, Launch

_MERGE: dict[str, Any] = {"B0": tiling.MERGE_SPLITS, "B1": tiling.MERGE_CHANNELS, "num_warps": 8}


def prepared(kernel: Kernel, t: Tiling, sizes: tuple[int, ...], **constants: Any) -> Launch:
    """Return the launch of a kernel whose sizes are the tiling's shape and channels, and then `sizes`."""
    key = (kernel, sizes, *constants.values())
    found: Launch | None = t.launches.get(key)
    if found is None:
        found = t.launches[key] = Launch(kernel, t.grid, (*t.shape, t.channels, *sizes), constants | t.constants)
    return found


def merge(kernel: Kernel, t: Tiling, groups: int, **constants: Any) -> Launch:
    """Return the launch of a kernel that merges the splits of samples by their index."""
    key = (kernel, groups, *constants.values())
    found: Launch | None = t.launches.get(key)
    if found is None:
        sizes = (t.channels, t.splits, t.merge_blocks)
        found = t.launches[key] = Launch(kernel, (t.merge_blocks * groups,), sizes, constants | _MERGE)
    return found


class Scratch(NamedTuple):
    """Memory for the results of each split, the counters of the merge, and the number of rows of the memory."""

    parts: Tensor | None
    counters: Tensor | None
    rows: int


def scratch_of(frame: Frame, t: Tiling, index: Tensor | None, number: int) -> Scratch:
    """Return memory for `number` results of each split. A single split needs none.

    With an index, splits are merged by another launch, without counters.
    """
    if index is not None:
        return Scratch(frame.vectors(1, number, t.splits, t.channels)[0], None, t.splits)
    if t.splits == 1:
        return Scratch(None, None, 1)
    rows = tiling.merged_rows(t.splits, finish.FAN.value)
    return Scratch(frame.vectors(1, number, rows, t.channels)[0], counters(frame.device, rows * t.blocks), rows)
