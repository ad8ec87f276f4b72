"""A comparison on several processes, started by torchrun."""

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
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process evaluates, writes and prints."""
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Check that every process has a share of a batch.

        Raises:
            ComparisonError: If there are more processes than samples in a batch.
        """
        if batch_size < self.size:
            raise ComparisonError(
                f"batch_size must be at least the number of processes, {self.size}, got {batch_size}. Choose a larger "
                "one, or start fewer processes."
            )

    def seed(self, number: int) -> None:
        """Seed the random generator differently on each process, so that dropout masks differ."""
        torch.manual_seed(number + 1_000_003 * self.rank)

    def together(self, call: Callable[[], T]) -> T:
        """Return the result of the call; if it fails on one process, raise on all.

        Raises:
            ComparisonError: The failure of the lowest rank, on every process.
            OSError: Likewise.
        """
        if self.size == 1:
            return call()
        value: T | None = None
        error: Exception | None = None
        try:
            value = call()
        except (ComparisonError, OSError) as raised:
            error = raised
        errors: list[Exception | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        failed = {rank: each for rank, each in enumerate(errors) if each is not None}
        if failed:
            rank, first = next(iter(failed.items()))
            if isinstance(first, ComparisonError) and len(failed) < self.size:
                first.rank = rank
            raise first
        return cast(T, value)

    def on_first(self, call: Callable[[], None]) -> None:
        """Call `call` on the first process only; if it fails, raise on all."""
        self.together(call if self.first else lambda: None)

    @contextmanager
    def naming_first_failure(self) -> Iterator[None]:
        """Name the process that failed first, also on the processes that fail because of it.

        The first process to fail writes its rank to the group's store. On the others, the next exchange of gradients
        then fails with an obscure message of the backend. This block raises an error with that rank instead.
        """
        try:
            yield
        except Exception as error:
            first = self._first_to_fail()
            if self.size > 1 and isinstance(error, ComparisonError):
                error.rank = first
                if first != self.rank:
                    raise ComparisonError(
                        f"all {self.size} processes must continue for process {self.rank} to continue, but process "
                        f"{first} failed. See the error of process {first}.",
                        rank=first,
                    ) from error
            raise

    def _first_to_fail(self) -> int:
        if self.size == 1:
            return 0
        try:
            store = dist.distributed_c10d._get_default_store()
            return int(store.compare_set("batchnorm/compare/failed", "", str(self.rank)))
        except RuntimeError:  # the process that held the store has ended
            return self.rank

    def share(self, index: Tensor) -> Tensor:
        """Return this process's part of a batch."""
        return index.tensor_split(self.size)[self.rank]

    def joined(self, network: nn.Module) -> nn.Module:
        """Return the network, with its gradients averaged over the processes."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def mean(self, value: Tensor) -> float:
        """Return the average over the processes."""
        if self.size > 1:
            value = value.detach().double()
            dist.all_reduce(value)
            value = value / self.size
        return float(value)

    def from_first(self, value: T) -> T:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]


def launched() -> Processes:
    """Return this process's rank and the group's size, from torch.distributed if initialized, else from torchrun."""
    if dist.is_available():
        if dist.is_initialized():
            return Processes(dist.get_rank(), dist.get_world_size())
        if dist.is_torchelastic_launched():
            return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started during the block; do nothing if this process was started alone."""
    here = launched()
    if here.size == 1 or dist.is_initialized():
        yield here
        return
    dist.init_process_group("gloo")
    try:
        yield here
    finally:
        dist.destroy_process_group()
