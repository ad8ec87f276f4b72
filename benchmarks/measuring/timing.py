"""Times of contenders in alternation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def passes_in_turns(
    contenders: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]],
    seconds: float,
    *,
    least: int = 5,
    most: int = 60,
) -> dict[str, tuple[Times, Times]]:
    """Call contenders of two passes in turns for about `seconds`, and return the times of each pass.

    Args:
        contenders: The passes by name, in a rotating order. The second takes the result of the first.
        seconds: Time for all contenders; exceeded if `least` rounds take longer.
        least: Fewest rounds.
        most: Most rounds.
    """

    def once(name: str) -> tuple[float, float]:
        first, second = contenders[name]
        start = time.perf_counter()
        result = first()
        middle = time.perf_counter()
        second(result)
        return middle - start, time.perf_counter() - middle

    names = list(contenders)
    short = {name: sum(min(once(name) for _ in range(2))) < _SHORT for name in names}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < least or (time.perf_counter() < end and rounds < most):
            at = rounds % len(names)
            for name in names[at:] + names[:at]:
                if short[name]:
                    once(name)
                found[name].append(once(name))
            rounds += 1
    finally:
        gc.enable()
    both = {name: np.array(values).T for name, values in found.items()}
    return {name: (Times(first), Times(second)) for name, (first, second) in both.items()}


def _measured(call: Callable[[], object]) -> dict[str, float]:
    """Return milliseconds: `cpu_ms` of all threads, without other processes' share, and `elapsed_ms`."""
    cpu = time.process_time()
    elapsed = _once(call)
    cpu = time.process_time() - cpu
    return {"cpu_ms": 1e3 * cpu, "elapsed_ms": 1e3 * elapsed}


def in_rounds(
    contenders: dict[str, Callable[[], object]],
    settings: dict[str, Callable[[], object]],
    seconds: float,
    *,
    least: int = 5,
    most: int = 40,
) -> dict[str, list[dict[str, float]]]:
    """Call each contender once under each setting, in every round for about `seconds`, in random order.

    In a rotating order, each contender would nearly always follow the same other one, which decides what the caches
    and the allocator hold.

    Args:
        contenders: Calls by name: whole training steps. Each is first called once untimed.
        settings: Calls by name that change the process, such as its allocator. The first contender is called once
            untimed after each.
        seconds: Time for all contenders and settings; exceeded if `least` rounds take longer.
        least: Fewest rounds.
        most: Most rounds.

    Returns:
        For each setting and round, milliseconds as `{name}_elapsed_ms`, and of all threads as `{name}_cpu_ms`.
    """
    names = list(contenders)
    for name in names:
        contenders[name]()
    found: dict[str, list[dict[str, float]]] = {setting: [] for setting in settings}
    order = np.random.default_rng(0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or (time.perf_counter() < end and rounds < most):
        for setting in order.permutation(list(settings)):
            settings[setting]()
            contenders[names[0]]()
            times = {names[i]: _measured(contenders[names[i]]) for i in order.permutation(len(names))}
            found[setting].append({f"{name}_{kind}": ms for name in names for kind, ms in times[name].items()})
        rounds += 1
    return found


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
            found[name] = {kind: min(found[name][kind], ms) for kind, ms in _measured(call).items()}
        rounds += 1
    return found


def with_interval(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, resamples: int = 10_000
) -> tuple[float, float, float]:
    """Return a statistic of samples and its 95 % interval, the percentile bootstrap over the entries of each sample.

    Args:
        statistic: Computes it from the samples `[n, ...]`, or from many resamples of each `[resamples, n, ...]`.
        samples: One entry per round.
        resamples: Number of resamples.
    """
    random = np.random.default_rng(0)
    picked = [sample[random.integers(0, len(sample), (resamples, len(sample)))] for sample in samples]
    low, high = np.percentile(statistic(*picked), [2.5, 97.5])
    return float(statistic(*samples)), float(low), float(high)
