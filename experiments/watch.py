"""Measure the cost of watching, with watched and unwatched steps of a ResNet-18 on the CPU in turns.

python experiments/watch.py [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

import batchnorm
from batchnorm.doctor import Watch
from benchmarks.subjects.networks import resnet18

BATCH, SIZE = 32, 64


def step_of(model: torch.nn.Module) -> Callable[[], float]:
    """Return a function that makes a training step and returns its duration in seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(1000, (BATCH,), generator=generator)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def _network(name: str) -> torch.nn.Module:
    model = resnet18()
    return model if name == "torch" else batchnorm.accelerate(model).model


def main(rounds: int, names: list[str]) -> None:
    """Print the costs for torch's layers and for this library's."""
    for name in names:
        torch.manual_seed(0)
        plain = step_of(_network(name))
        torch.manual_seed(0)
        model = _network(name)
        watched = step_of(model)
        for _ in range(3):
            plain()
            watched()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        costs: list[float] = []  # counted by the watch itself, in each watched step
        with Watch(model, warn=False, clock=lambda: time.perf_counter() - sum(seconds[False])) as w:  # noqa: B023
            for number in range(rounds):
                for which in (False, True) if number % 2 else (True, False):
                    looks = w.looks
                    seconds[which].append((watched if which else plain)())
                    if which:
                        costs.append(w.cost or 0.0 if w.looks > looks else 0.0)
        more = np.array(seconds[True]) - np.array(seconds[False])
        step, looked = statistics.median(seconds[False]), np.array(costs) > 0
        with_look, without = (float(np.median(more[which])) for which in (looked, ~looked))
        together = looked.mean() * with_look + (1 - looked.mean()) * without
        own = sum(costs[2:]) / sum(seconds[True][2:])  # the first look is free
        print(
            f"{name}: a step takes {step * 1e3:.0f} ms; {w.looks} of {rounds} were looked at\n"
            f"  against the unwatched step of the same round, in the median: with a look {with_look * 1e3:+.1f} ms, "
            f"without {without * 1e3:+.1f} ms, together {together / step:+.2%}\n"
            f"  own count: a look {1e3 * np.median(np.array(costs)[looked]):.1f} ms, in all {own:.2%}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50, sys.argv[2:] or ["torch", "batchnorm"])
