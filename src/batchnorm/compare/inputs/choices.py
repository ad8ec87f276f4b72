"""The grid of a comparison: combinations of norm, placement, learning rate, batch size and sampling."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, fields
from typing import Any

from batchnorm.compare.errors import ComparisonError, check_among
from batchnorm.compare.inputs.norms import PLACEMENTS


@dataclass(frozen=True)
class Choice:
    """One combination, trained once with each seed.

    Attributes:
        norm: The normalization, as the user wrote it.
        placement: Its placement, `before` or `after` the activation.
        lr: Learning rate.
        batch_size: Samples in each training step.
        sampling: How batches are drawn: `iid`, or `classes:2` for batches of two classes.
    """

    norm: str
    placement: str = "before"
    lr: float = 0.1
    batch_size: int = 64
    sampling: str = "iid"

    @property
    def file_stem(self) -> str:
        """The choice as part of a file name; it does not depend on the rest of the comparison."""
        parts = (self.norm, self.placement, f"lr{self.lr:g}", f"batch{self.batch_size}", self.sampling)
        return "-".join(re.sub(r"[^A-Za-z0-9._=]+", "-", part) for part in parts)


@dataclass(frozen=True)
class Grid:
    """The values of each field of `Choice`; every combination of them is trained.

    `none` has nothing to place, so it is trained with the first placement only.
    """

    norm: tuple[str, ...]
    placement: tuple[str, ...]
    lr: tuple[float, ...]
    batch_size: tuple[int, ...]
    sampling: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the placements, and that the names of the runs' files differ."""
        for placement in self.placement:
            check_among("placement", placement, PLACEMENTS)
        stems = [choice.file_stem.lower() for choice in self.choices]
        for choice, stem in zip(self.choices, stems, strict=True):
            if stems.count(stem) > 1:
                raise ComparisonError(
                    f"choices must differ in letters and digits, which name their files, but two have the file name of "
                    f"{choice.norm!r} with learning rate {choice.lr:g}. Write one of them in another way."
                )

    @property
    def choices(self) -> list[Choice]:
        """All combinations, those with the first norm first."""
        every = (Choice(*values) for values in itertools.product(*(getattr(self, f.name) for f in fields(self))))
        return [choice for choice in every if choice.norm != "none" or choice.placement == self.placement[0]]

    @property
    def varying(self) -> tuple[str, ...]:
        """The names of the fields with more than one value."""
        return tuple(f.name for f in fields(self) if len(getattr(self, f.name)) > 1)

    def label(self, choice: Choice) -> str:
        """Return the choice's name in this comparison: its values of the varying fields, or its norm if none varies."""
        varying = self.varying or ("norm",)
        parts = {
            "norm": choice.norm,
            "placement": "" if choice.norm == "none" else f"{choice.placement} activation",
            "lr": f"lr {choice.lr:g}",
            "batch_size": f"batches of {choice.batch_size}",
            "sampling": choice.sampling,
        }
        return ", ".join(part for name, part in parts.items() if name in varying and part)

    def title(self, choice: Choice, norm_title: str) -> str:
        """Return the choice's name in a sentence.

        Args:
            choice: One of `choices`.
            norm_title: The name of its norm in a sentence.
        """
        parts = {
            "placement": "" if choice.norm == "none" else f"{choice.placement} the activation",
            "lr": f"at learning rate {choice.lr:g}",
            "batch_size": f"with batches of {choice.batch_size}",
            "sampling": f"under {choice.sampling} sampling",
        }
        named = [part for name, part in parts.items() if name in self.varying and part]
        return " ".join([norm_title, *named])

    def missing_from(self, other: Grid) -> dict[str, list[Any]]:
        """Return, by field, the values that `other` lacks."""
        found = {f.name: [v for v in getattr(self, f.name) if v not in getattr(other, f.name)] for f in fields(self)}
        return {name: values for name, values in found.items() if values}
