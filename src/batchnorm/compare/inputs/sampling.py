"""How batches are drawn from the training data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.compare.errors import ComparisonError


@dataclass(frozen=True)
class Sampling:
    """A way to draw batches.

    Attributes:
        classes: Number of classes in each batch; None for independent, identically distributed samples.
    """

    classes: int | None = None

    @classmethod
    def parse(cls, spec: str) -> Sampling:
        """Return the sampling that `iid` or `classes:2` names.

        Raises:
            ComparisonError: If it is neither.
        """
        if spec == "iid":
            return cls()
        found = re.fullmatch(r"classes:([1-9][0-9]*)", spec) if isinstance(spec, str) else None
        if found is None:
            raise ComparisonError(
                f"sampling must be iid or classes:K with a positive integer K, got {spec!r}. For batches of two "
                "classes, write classes:2."
            )
        return cls(int(found[1]))

    @property
    def title(self) -> str:
        """Its description after the number of samples in a sentence."""
        if self.classes is None:
            return ", drawn without regard to class,"
        return f", drawn from {self.classes} class{'es' if self.classes > 1 else ''} each,"

    def check(self, labels: Tensor, batch_size: int) -> None:
        """Check that the data have enough classes, and that a batch has room for them.

        Raises:
            ComparisonError: If not.
        """
        if self.classes is None:
            return
        present = len(labels.unique())
        for limit, what in ((present, "classes in the training data"), (batch_size, "samples in a batch")):
            if self.classes > limit:
                raise ComparisonError(
                    f"sampling must not draw more classes for a batch than there are {what}, {limit}, got "
                    f"classes:{self.classes}. Choose fewer."
                )

    def batches(self, labels: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Yield the indices of each batch, endlessly.

        Independent batches take every sample once per epoch, in a new random order. An epoch skips its last samples if
        they are too few for a batch.

        Batches of few classes draw new classes each time, with probabilities proportional to the classes' sizes. Each
        class supplies an equal part of the batch; if the division leaves a remainder, some supply one sample more. The
        samples of a class are taken in random order, and reshuffled when all have been used. Within a batch, the
        classes are mixed.

        Args:
            labels: int64 `[N]`, the class of each sample.
            batch_size: Samples in each batch.
            seed: Determines all the batches.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.classes is None:
            return _shuffled(torch.arange(len(labels), device="cpu"), batch_size, generator)
        return self._of_classes(labels, batch_size, generator)

    def _of_classes(self, labels: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        assert self.classes is not None
        present, counts = labels.unique(return_counts=True)
        orders = [_one_by_one((labels == label).nonzero().flatten(), generator) for label in present]
        whole, more = divmod(batch_size, self.classes)
        while True:
            drawn = torch.multinomial(counts.double(), self.classes, generator=generator).tolist()
            batch = [next(orders[which]) for place, which in enumerate(drawn) for _ in range(whole + (place < more))]
            yield torch.tensor(batch, device="cpu")[torch.randperm(batch_size, generator=generator, device="cpu")]


IID = Sampling()


def _shuffled(index: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        order = index[torch.randperm(len(index), generator=generator, device="cpu")]
        yield from order[: len(index) // batch_size * batch_size].split(batch_size)


def _one_by_one(index: Tensor, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from index[torch.randperm(len(index), generator=generator, device="cpu")].tolist()
