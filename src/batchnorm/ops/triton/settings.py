"""The tunable settings by which a tensor is cut into tiles and programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of one class of tensors; `table.py` holds one for each.

    Args:
        tile: Values of one tile, where a program goes over several.
        warps: Warps of such a program.
        stages: Tiles in flight; those loaded ahead wait in shared memory.
        programs: Such programs per multiprocessor.
        row_bytes: Bytes of the widest piece of a row of channels that one program takes (channels-last).
        once: Largest tile, padding included, that a program holds to read x once; half of it in backward, which holds
            two tensors, and half for channels-last.
        deepest: Largest number of tiles that one lane adds in sequence, which bounds its rounding error; not tuned.
    """

    tile: int = 2048
    warps: int = 8
    stages: int = 3
    programs: int = 4
    row_bytes: int = 256
    once: int = 32768
    deepest: int = 64


# The values that tuning tries, one field after the other.
CANDIDATES: dict[str, tuple[int, ...]] = {
    "tile": (1024, 2048, 4096),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "programs": (2, 4, 8),
    "row_bytes": (128, 256, 512),
    "once": (0, 16384, 32768),
}
