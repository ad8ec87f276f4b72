"""One of the processes whose statistics are joined, and what its checks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from batchnorm.nn.sync import SyncBatchNorm

PROCESSES = 4


class Group:
    """A group of the first `size` processes, and the rank of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.rank = size, dist.get_rank()
        self.process_group = dist.new_group(range(size), timeout=timedelta(seconds=120))

    def cuts(self, n: int) -> list[int]:
        """Return where n samples are split: unevenly, and with more than two processes, one has none."""
        return {2: [n - n // 4], 3: [n // 3, n // 3], 4: [0, (n + 2) // 3, n - n // 4]}[self.size]

    def share(self, t: Tensor) -> Tensor:
        return t.tensor_split(self.cuts(t.shape[0]))[self.rank]

    def total(self, t: Tensor) -> Tensor:
        total = t.detach().to(torch.float64, copy=True)
        dist.all_reduce(total, group=self.process_group)
        return total

    def layer(self, num_features: int, **options: Any) -> SyncBatchNorm:
        return SyncBatchNorm(num_features, process_group=self.process_group, **options)


def wide(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy()


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Count the collectives of the block."""
    counted: Counter[str] = Counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        yield counted
    counted.update(event.name for event in found.events() if event.name.startswith("gloo:"))


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def network(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), norm(5), nn.Flatten(), nn.Linear(80, 2)
    ).double()
