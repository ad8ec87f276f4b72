"""The processes that work on a model together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """The processes of a group, or this process alone.

    Args:
        caller: The function that the user called, for error messages.
        group: A process group; None for all processes.
        synchronize: Whether to communicate with the other processes.
    """

    def __init__(self, caller: str, group: Any = None, *, synchronize: bool = True) -> None:
        self._caller = caller
        self._group = group
        joined = synchronize and dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if joined else 1

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Return the results of `work()` on all ranks, in order. A failure on one rank raises an error on all.

        Raises:
            RuntimeError: `work` failed on another rank, which the message names.
        """
        if self.count == 1:
            return [work()]
        mine: tuple[T | None, str | None]
        error: Exception | None = None
        try:
            mine = work(), None
        except Exception as caught:  # raised below, because the others would wait forever
            error, mine = caught, (None, f"{type(caught).__name__}: {caught}")
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, mine, group=self._group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(gathered):
            if failure is not None:
                raise RuntimeError(
                    f"{self._caller} stopped because rank {rank} failed with {failure}. "
                    "The model is unchanged on every rank: fix the failure and start again."
                )
        return [result for result, _ in gathered]
