"""The grid of a comparison: every combination of network, norm, and settings of training."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, fields, replace
from typing import Any

from batchnorm.compare.errors import ComparisonError, check_among
from batchnorm.compare.inputs.norms import AS_IS, PLACEMENTS, UNPLACED


@dataclass(frozen=True)
class Choice:
    """One combination, trained once with each seed.

    Attributes:
        norm: The normalization, as the user wrote it.
        placement: Its placement, `before` or `after` the activation.
        lr: Learning rate.
        batch_size: Samples in each training step.
        sampling: How batches are drawn: `iid`, or `classes:2` for batches of two classes.
        dropout: Probability of dropout, 0 to 1; None for the network's own.
        model: Name of the network.
    """

    norm: str
    placement: str = "before"
    lr: float = 0.1
    batch_size: int = 64
    sampling: str = "iid"
    dropout: float | None = None
    model: str = "mlp"

    @property
    def file_stem(self) -> str:
        """The choice as part of a file name; it does not depend on the rest of the comparison."""
        parts = [self.model, self.norm, self.placement, f"lr{self.lr:g}", f"batch{self.batch_size}", self.sampling]
        parts += [] if self.dropout is None else [f"dropout{self.dropout:g}"]
        return "-".join(re.sub(r"[^A-Za-z0-9._=]+", "-", part) for part in parts)

    @property
    def rival(self) -> Choice:
        """The choice without learning rate and batch size, of which each rival is shown at its best."""
        return replace(self, lr=0.0, batch_size=0)


@dataclass(frozen=True)
class Grid:
    """The values of each field of `Choice`; every combination of them is trained.

    `none` and `as-is` have nothing to place, so they are trained with the first placement only.
    """

    norm: tuple[str, ...]
    placement: tuple[str, ...]
    lr: tuple[float, ...]
    batch_size: tuple[int, ...]
    sampling: tuple[str, ...]
    dropout: tuple[float | None, ...]
    model: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the placements, and that the names of the runs' files differ."""
        for placement in self.placement:
            check_among("placement", placement, PLACEMENTS)
        stems = [choice.file_stem.lower() for choice in self.choices]
        for choice, stem in zip(self.choices, stems, strict=True):
            if stems.count(stem) > 1:
                raise ComparisonError(
                    f"choices must differ in letters and digits, which name their files, but two have the file name of "
                    f"{choice.norm!r} in {choice.model} with learning rate {choice.lr:g}. Write one of them in another "
                    "way."
                )

    @property
    def choices(self) -> list[Choice]:
        """All combinations, those with the first norm first."""
        every = (Choice(*values) for values in itertools.product(*(getattr(self, f.name) for f in fields(self))))
        return [choice for choice in every if choice.norm not in UNPLACED or choice.placement == self.placement[0]]

    @property
    def varying(self) -> tuple[str, ...]:
        """The names of the fields with more than one value."""
        return tuple(f.name for f in fields(self) if len(getattr(self, f.name)) > 1)

    def short_name(self, model: str) -> str:
        """Return the last part of a network's name, or the whole name if another network has the same last part."""
        last = [re.split(r"[:.]", name)[-1] for name in self.model]
        short = last[self.model.index(model)]
        return short if last.count(short) == 1 else model

    def label(self, choice: Choice) -> str:
        """Return the choice's name in this comparison: its values of the varying fields, or its norm if none varies."""
        varying = self.varying or ("model" if self.norm == (AS_IS,) else "norm",)
        parts = {
            "model": self.short_name(choice.model),
            "norm": choice.norm,
            "placement": "" if choice.norm in UNPLACED else f"{choice.placement} activation",
            "lr": f"lr {choice.lr:g}",
            "batch_size": f"batches of {choice.batch_size}",
            "sampling": choice.sampling,
            "dropout": "" if choice.dropout is None else f"dropout {choice.dropout:g}",
        }
        return ", ".join(part for name, part in parts.items() if name in varying and part)

    def title(self, choice: Choice, norm_title: str) -> str:
        """Return the choice's name in a sentence.

        Args:
            choice: One of `choices`.
            norm_title: The name of its norm in a sentence.
        """
        model = self.short_name(choice.model)
        head = model if self.norm == (AS_IS,) else norm_title
        parts = {
            "model": "" if head == model else f"in {model}",
            "placement": "" if choice.norm in UNPLACED else f"{choice.placement} the activation",
            "lr": f"at learning rate {choice.lr:g}",
            "batch_size": f"with batches of {choice.batch_size}",
            "sampling": f"under {choice.sampling} sampling",
            "dropout": "" if choice.dropout is None else f"with dropout {choice.dropout:g}",
        }
        named = [part for name, part in parts.items() if name in self.varying and part]
        return " ".join([head, *named])

    def missing_from(self, other: Grid) -> dict[str, list[Any]]:
        """Return, by field, the values that `other` lacks."""
        found = {f.name: [v for v in getattr(self, f.name) if v not in getattr(other, f.name)] for f in fields(self)}
        return {name: values for name, values in found.items() if values}
