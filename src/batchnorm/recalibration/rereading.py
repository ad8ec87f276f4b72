"""Read data several times, with the same batches in the same order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from batchnorm.models.data.batches import Batches
from batchnorm.models.data.samples import samples_in


class RepeatableBatches(Batches):
    """The user's data, with the initial state of the random generators."""

    def __init__(self, data: Iterable[Any], max_samples: int | None) -> None:
        super().__init__(data, max_samples)
        self._start = _random_state(data)

    def again(self, after: int) -> Iterator[Any]:
        """Read the data once more and yield the batches after the first `after`.

        Raises:
            ValueError: the data cannot be read again, or the batches differ.
        """
        if isinstance(self.data, Iterator):
            raise ValueError(
                f"recalibrate with passes='sequential' expects data that can be read again, got an iterator "
                f"({type(self.data).__name__}). Pass a list or a DataLoader, or raise cache_bytes so that all "
                "batches are kept."
            )
        _set_random_state(self.data, self._start)
        count = samples = 0
        for batch in self.data:
            count += 1
            samples += samples_in(batch)
            if count > after:
                yield batch
            if count == self.count:
                break
        if (count, samples) != (self.count, self._estimate):
            raise ValueError(
                f"recalibrate with passes='sequential' expects the same batches each time data are read, got {samples} "
                f"samples in {count} batches after {self._estimate} in {self.count}. Fix the order, or raise "
                "cache_bytes so that all batches are kept."
            )


def _generators(data: object) -> list[torch.Generator]:
    """Return the random generators that a DataLoader and its samplers own."""
    owners = (data, getattr(data, "sampler", None), getattr(getattr(data, "batch_sampler", None), "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [g for g in found if isinstance(g, torch.Generator)]


def _random_state(data: object) -> tuple[Any, ...]:
    own = [g.get_state() for g in _generators(data)]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), own  # noqa: NPY002  (other code draws from it)


def _set_random_state(data: object, state: tuple[Any, ...]) -> None:
    python, numpy, default, own = state
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(default)
    for generator, former in zip(_generators(data), own, strict=True):
        generator.set_state(former)
