"""The effect of padding on the statistics of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaddingEffect:
    """The effect of padding on the statistics of each layer, in one batch.

    Attributes:
        share: Share of the positions that are padding.
        ends: Where the padding is: "beginning" or "end" of sequences, "top", "left" and so on of images.
        shifts: Difference of the statistics with and without padding, by the layer's path: the root mean square
            difference of the means in σ, or of ln σ if that is larger.
    """

    share: float
    ends: tuple[str, ...]
    shifts: Mapping[str, float]
