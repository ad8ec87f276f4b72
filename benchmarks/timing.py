"""Times of contenders in alternation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_SHORT = 0.005  # seconds: a shorter call is preceded by an untimed one, which refills the caches


@dataclass(frozen=True)
class Times:
    """Seconds per call, one entry per timed turn."""

    seconds: np.ndarray

    def percentile(self, p: float) -> float:
        return float(np.percentile(self.seconds, p))

    @property
    def median(self) -> float:
        return self.percentile(50)


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _many(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def alternate(
    contenders: dict[str, Callable[[], object]], seconds: float, *, least: int = 5, most: int = 60
) -> dict[str, Times]:
    """Call the contenders in turns for about `seconds`, in a rotating order, and return the times of each.

    Args:
        contenders: Calls by name. The result of a call is freed within its time, as in a training loop.
        seconds: Time for all contenders; exceeded if `least` rounds take longer.
        least: Fewest rounds.
        most: Most rounds.
    """
    names = list(contenders)
    estimate = {}
    for name in names:
        contenders[name]()
        estimate[name] = min(_once(contenders[name]) for _ in range(2))
    repeats = {name: max(1, int(2e-4 / max(t, 1e-7))) for name, t in estimate.items()}
    turns = {name: 3 if t < 4 * _SHORT else 1 for name, t in estimate.items()}
    round_seconds = sum(t * repeats[n] * turns[n] + (t if t < _SHORT else 0) for n, t in estimate.items())
    rounds = int(min(max(seconds / round_seconds, least), most))
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            at = i % len(names)
            for name in names[at:] + names[:at]:
                call = contenders[name]
                if estimate[name] < _SHORT:
                    call()
                found[name] += [_many(call, repeats[name]) for _ in range(turns[name])]
    finally:
        gc.enable()
    return {name: Times(np.array(values)) for name, values in found.items()}


def in_rounds(
    contenders: dict[str, Callable[[], object]], numbers: Iterable[int]
) -> Iterator[tuple[int, dict[str, float]]]:
    """Call each contender twice untimed, then once in every round, in a rotating order.

    Args:
        contenders: Calls by name: whole training steps.
        numbers: Numbers of the rounds.

    Yields:
        The round's number, and milliseconds as `{name}_ms`.
    """
    names = list(contenders)
    for name in names:
        contenders[name]()
        contenders[name]()
    gc.collect()
    for i in numbers:
        at = i % len(names)
        seconds = {name: _once(contenders[name]) for name in names[at:] + names[:at]}
        yield i, {f"{name}_ms": seconds[name] * 1e3 for name in names}


def shortest(contenders: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Call the contenders in turns for about `seconds`, and return the shortest times of each.

    Args:
        contenders: Calls by name; each is first called once untimed.
        seconds: Time for all contenders; exceeded if 3 rounds take longer.

    Returns:
        Milliseconds: `cpu_ms` of all threads, without other processes' share, and `elapsed_ms`.
    """
    for call in contenders.values():
        call()
    found = {name: {"cpu_ms": float("inf"), "elapsed_ms": float("inf")} for name in contenders}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 60):
        for name, call in contenders.items():
            cpu = time.process_time()
            elapsed = _once(call)
            cpu = time.process_time() - cpu
            times = {"cpu_ms": 1e3 * cpu, "elapsed_ms": 1e3 * elapsed}
            found[name] = {kind: min(found[name][kind], ms) for kind, ms in times.items()}
        rounds += 1
    return found


def with_interval(
    rounds: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = 10_000
) -> tuple[float, float, float]:
    """Return a statistic of rounds and its 95 % interval, the percentile bootstrap over rounds.

    Args:
        rounds: One entry per round.
        statistic: Computes it for rounds `[n, ...]`, or for many samples of them `[resamples, n, ...]`.
        resamples: Number of samples.
    """
    picks = np.random.default_rng(0).integers(0, len(rounds), (resamples, len(rounds)))
    low, high = np.percentile(statistic(rounds[picks]), [2.5, 97.5])
    return float(statistic(rounds)), float(low), float(high)
