"""The processes that recalibrate one model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes of a group, or this one alone.

    Args:
        group: A process group; None for all processes.
        synchronize: False leaves this process alone, whatever group there is.
    """

    def __init__(self, group: Any = None, *, synchronize: bool = True) -> None:
        self._group = group
        joined = synchronize and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if joined else 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work()` returns on every rank, in order; where it fails on one rank it fails on all.

        Raises:
            RuntimeError: it failed on another rank, which is named.
        """
        if self.count == 1:
            return [work()]
        mine: tuple[T | None, str | None]
        error: Exception | None = None
        try:
            mine = work(), None
        except Exception as caught:  # told to the others, who would wait forever; raised below
            error, mine = caught, (None, f"{type(caught).__name__}: {caught}")
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, mine, group=self._group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RuntimeError(
                    f"recalibrate stopped because rank {rank} failed with {failure}. "
                    "The model is as it was on every rank: correct that, and start again."
                )
        return [result for result, _ in gathered]
