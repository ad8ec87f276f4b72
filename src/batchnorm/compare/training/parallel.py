"""A comparison on several processes, as torchrun starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.compare.errors import ComparisonError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes that train one network together, each on its share of every batch.

    Attributes:
        rank: This one's number.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that evaluates, writes and prints."""
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Checks that every process has a share.

        Raises:
            ComparisonError: If there are more processes than samples in a batch.
        """
        if batch_size < self.size:
            raise ComparisonError(
                f"batch_size must be at least the number of processes, {self.size}, got {batch_size}. Choose a larger "
                "one, or start fewer processes."
            )

    def seed(self, number: int) -> None:
        """Seeds the random generator, with another state on each process: dropout is not to repeat itself there."""
        torch.manual_seed(number + 1_000_003 * self.rank)

    def together(self, call: Callable[[], T]) -> T:
        """Returns what the call returns; where it fails on one process, it fails on all.

        Raises:
            ComparisonError: The first one that some process met, on all alike.
            OSError: Likewise.
        """
        value: T | None = None
        error: Exception | None = None
        try:
            value = call()
        except (ComparisonError, OSError) as raised:
            if self.size == 1:
                raise
            error = raised
        if self.size > 1:
            errors: list[Exception | None] = [None] * self.size
            dist.all_gather_object(errors, error)
            failed = [rank for rank, each in enumerate(errors) if each is not None]
            if failed:
                first = errors[failed[0]]
                assert first is not None
                if isinstance(first, ComparisonError) and len(failed) < self.size:
                    first.rank = failed[0]
                raise first
        return cast(T, value)

    def on_first(self, call: Callable[[], None]) -> None:
        """Calls it on the first process; what that raises is raised on all alike."""
        self.together(call if self.first else lambda: None)

    @contextmanager
    def blame(self) -> Iterator[None]:
        """Tells what failed here from what failed because another process did, once they exchange gradients.

        The first to fail leaves its number in the group's store. The others, whose next exchange fails with
        whatever the backend says then, name it instead.
        """
        try:
            yield
        except Exception as error:
            first = self._first_to_fail()
            if self.size > 1 and isinstance(error, ComparisonError):
                error.rank = first
                if first != self.rank:
                    raise ComparisonError(
                        f"process {self.rank} can go on only while all {self.size} do, but process {first} failed. "
                        "See what that one says.",
                        rank=first,
                    ) from error
            raise

    def _first_to_fail(self) -> int:
        if self.size == 1:
            return 0
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.compare_set("batchnorm/compare/failed", "", str(self.rank)))
        except RuntimeError:  # the store ended with the process that held it
            return self.rank

    def share(self, index: Tensor) -> Tensor:
        """Returns this process's part of a batch."""
        return index.tensor_split(self.size)[self.rank]

    def joined(self, network: nn.Module) -> nn.Module:
        """Returns the network such that its gradients are the average over the processes."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def mean(self, value: Tensor) -> float:
        """Returns the average over the processes."""
        if self.size > 1:
            value = value.detach().double()
            dist.all_reduce(value)
            value = value / self.size
        return float(value)

    def from_first(self, value: T) -> T:
        """Returns what the first process has."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


def launched() -> Processes:
    """Returns who this process is, from torch.distributed where that is initialized, else from torchrun."""
    if dist.is_available():
        if dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        if dist.is_torchelastic_launched():
            return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes that torchrun started, for the block; joins none where this one was started alone."""
    here = launched()
    if here.size == 1 or dist.is_initialized():
        yield here
        return
    dist.init_process_group("gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()
