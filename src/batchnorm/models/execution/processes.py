"""The processes that work on a model together: a failure on one is raised on all, and the group stays usable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from batchnorm._options import as_clause
from batchnorm.distributed import group_name
from batchnorm.undo import Uninterrupted

T = TypeVar("T")

_blocks: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # the number of blocks that each group has begun


class Processes:
    """A block that the processes of a group run together, or this process alone.

    The block exchanges data with `gather`, the same number of times on every rank, and once more at its end. If the
    block of a rank raises, also because of an interruption, the rank sends its failure in place of the next exchange.
    All other ranks raise an error in that exchange. A rank in a long loop learns of the failure in `check`. Every rank
    takes part in each collective, so the group remains usable.

    Args:
        caller: The function that the user called, for error messages.
        group: A process group; None for all processes.
        synchronize: Whether to communicate with the other processes.

    Attributes:
        count: The number of processes; 1 if this process is alone.

    Raises:
        TypeError: group is not a process group.
        ValueError: this process is not in the group.
    """

    def __init__(self, caller: str, group: Any = None, *, synchronize: bool = True) -> None:
        self._caller = caller
        self._group = group
        self._over = False  # whether the processes make no further exchange
        self.count = 1
        group_name(group)
        if synchronize and dist.is_available() and dist.is_initialized():
            self._ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            self.count = len(self._ranks)

    def __enter__(self) -> Processes:
        if self.count > 1:
            group: Any = self._group or dist.group.WORLD
            _blocks[group] = _blocks.get(group, 0) + 1
            self._key = f"batchnorm/failed/{_blocks[group]}"
            self._store: Any = group.get_group_store()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.count == 1 or self._over:
            return
        if error is None:
            self.end()
            return
        with suppress(RuntimeError):  # such as a store that is gone; the error of the block is raised
            self._store.set(self._key, "")
            self._exchange("failed", ": ".join(filter(None, (type(error).__name__, str(error)))))
            self._store.delete_key(self._key)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order.

        Raises:
            RuntimeError: another rank failed, or is elsewhere in its block.
        """
        return [value] if self.count == 1 else self._exchange("value", value)

    def end(self) -> None:
        """Wait until all ranks have come to the end of the block. The block itself may do this, to undo its changes.

        Raises:
            RuntimeError: another rank failed.
        """
        if self.count > 1 and not self._over:
            self._exchange("end")

    def check(self) -> None:
        """Raise an error if another rank has failed; call this often in long loops.

        Raises:
            RuntimeError: another rank failed.
        """
        if self.count > 1 and not self._over and self._store.check([self._key]):
            self._exchange("stopped")

    def in_step(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, each when every rank has its own.

        Raises:
            ValueError: the ranks have different numbers of items; raised on every rank.
        """
        rest, missing = iter(items), object()
        while True:
            item: Any = next(rest, missing)
            has = self.gather(item is not missing)
            if not any(has):
                return
            if not all(has):
                raise ValueError(
                    f"{self._caller} expects equally many batches on every rank of a model whose forward communicates, "
                    f"got fewer on rank {self._ranks[has.index(False)]}. Give each rank the same number of batches."
                )
            yield item

    def _exchange(self, kind: str, value: Any = None) -> list[Any]:
        gathered: list[Any] = [None] * self.count
        try:
            with Uninterrupted():  # half of an exchange would leave the others waiting
                dist.all_gather_object(gathered, (kind, value), group=self._group)
        except RuntimeError as error:
            self._over = True
            raise RuntimeError(
                f"{self._caller} expects all of ranks {', '.join(map(str, self._ranks))} to call it, but their "
                f"exchange failed with: {as_clause(error)}. A process died, or is elsewhere in its program: end all "
                "processes."
            ) from error
        failures = [(rank, text) for rank, (k, text) in zip(self._ranks, gathered, strict=True) if k == "failed"]
        others = [(rank, k) for rank, (k, _) in zip(self._ranks, gathered, strict=True) if k != kind]
        self._over = bool(failures or others) or kind == "end"
        if failures and kind != "failed":
            rank, text = failures[0]
            raise RuntimeError(
                f"{self._caller} stopped because rank {rank} failed with {text}. "
                "Nothing has changed on any rank: fix the failure and start again."
            )
        if others and not failures:
            raise RuntimeError(
                f"{self._caller} expects the same arguments on every rank, but rank {others[0][0]} is at another step. "
                "Pass the same arguments."
            )
        return [value for _, value in gathered]
