"""Tunable settings for the division of a tensor into tiles and programs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The settings of one class of tensors; `table.py` holds one for each.

    Args:
        tile: Values of one tile, if a program loops over several tiles.
        warps: Warps of a program that loops over tiles.
        ahead: Tiles whose loads a program starts together, to have more bytes in flight.
        programs: Programs per multiprocessor, if they loop over tiles.
        row_bytes: Largest number of bytes of a row of channels that one program handles (channels-last).
        once: Largest tile, with padding, of a program that reads x once. Backward, which holds two tensors, uses half
            of it, and so does channels-last.
        deepest: Largest number of tiles that one lane adds in sequence, to limit the rounding error; not tuned.
    """

    tile: int = 2048
    warps: int = 8
    ahead: int = 4
    programs: int = 4
    row_bytes: int = 256
    once: int = 32768
    deepest: int = 64


# The values that tuning tries, one field at a time.
CANDIDATES: dict[str, tuple[int, ...]] = {
    "tile": (1024, 2048, 4096),
    "warps": (4, 8),
    "ahead": (1, 2, 4, 8),
    "programs": (2, 4, 8),
    "row_bytes": (128, 256, 512),
    "once": (0, 16384, 32768),
}
