"""What is compared: every combination of norms, placements, learning rates, batch sizes and ways to draw batches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from batchnorm.compare.errors import ComparisonError
from batchnorm.compare.inputs.norms import PLACEMENTS


@dataclass(frozen=True)
class Choice:
    """One combination, trained once with each seed.

    Attributes:
        norm: The normalization, as the user wrote it.
        placement: Where it stands, `before` or `after` the activation.
        lr: Learning rate.
        batch_size: Samples in each training step.
        sampling: How batches are drawn, `iid` or `classes:2`.
    """

    norm: str
    placement: str = "before"
    lr: float = 0.1
    batch_size: int = 64
    sampling: str = "iid"

    @property
    def file_stem(self) -> str:
        """The choice as part of a file's name, which does not depend on what else is compared."""
        parts = (self.norm, self.placement, f"lr{self.lr:g}", f"batch{self.batch_size}", self.sampling)
        return "-".join(re.sub(r"[^A-Za-z0-9._=]+", "-", part) for part in parts)


@dataclass(frozen=True)
class Grid:
    """The values of each field of `Choice`; every combination of them is trained.

    Without normalization there is nothing to place: `none` is trained with the first placement only.
    """

    norm: tuple[str, ...]
    placement: tuple[str, ...]
    lr: tuple[float, ...]
    batch_size: tuple[int, ...]
    sampling: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        for placement in self.placement:
            if placement not in PLACEMENTS:
                raise ComparisonError(
                    f"placement must be among {', '.join(PLACEMENTS)} (the activation), got {placement!r}. Choose from "
                    "these."
                )
        stems = [choice.file_stem.lower() for choice in self.choices]
        for choice, stem in zip(self.choices, stems, strict=True):
            if stems.count(stem) > 1:
                raise ComparisonError(
                    f"choices must differ in letters and digits, as their files are named after these, but another one "
                    f"has the name of {choice.norm!r} with learning rate {choice.lr:g}. Write it in another way."
                )

    @property
    def choices(self) -> list[Choice]:
        """Every combination; those of the first norm come first."""
        every = (Choice(*values) for values in itertools.product(*(getattr(self, f.name) for f in fields(self))))
        return [choice for choice in every if choice.norm != "none" or choice.placement == self.placement[0]]

    @property
    def varying(self) -> tuple[str, ...]:
        """The fields that have more than one value."""
        return tuple(f.name for f in fields(self) if len(getattr(self, f.name)) > 1)

    def label(self, choice: Choice) -> str:
        """Return the choice's name in this comparison: only what varies, or the norm where nothing does."""
        varying = self.varying or ("norm",)
        parts = {
            "norm": choice.norm,
            "placement": "" if choice.norm == "none" else f"{choice.placement} activation",
            "lr": f"lr {choice.lr:g}",
            "batch_size": f"batches of {choice.batch_size}",
            "sampling": choice.sampling,
        }
        return ", ".join(part for name, part in parts.items() if name in varying and part)

    def title(self, choice: Choice, norm_title: str, without: Sequence[str] = ()) -> str:
        """Return what the choice is called in a sentence.

        Args:
            choice: One of `choices`.
            norm_title: What its norm is called in a sentence.
            without: Fields that are not mentioned.
        """
        parts = {
            "placement": "" if choice.norm == "none" else f"{choice.placement} the activation",
            "lr": f"at learning rate {choice.lr:g}",
            "batch_size": f"with batches of {choice.batch_size}",
            "sampling": f"drawn {choice.sampling}",
        }
        named = [part for name, part in parts.items() if name in self.varying and name not in without and part]
        return " ".join([norm_title, *named])

    def missing_from(self, other: Grid) -> dict[str, list[Any]]:
        """Return, by field, the values here that `other` does not have."""
        found = {f.name: [v for v in getattr(self, f.name) if v not in getattr(other, f.name)] for f in fields(self)}
        return {name: values for name, values in found.items() if values}
