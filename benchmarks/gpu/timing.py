"""Times on a device, between two events around many calls with rotating inputs; and the time limit of a run."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


class Deadline:
    """The deadline of a run.

    Args:
        seconds: Seconds from now.
    """

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def passed(self, share: float = 1.0) -> bool:
        """Return whether this share of the time is over."""
        return self.elapsed >= share * self._seconds


class Watchdog:
    """A timer that ends the process if a call hangs, such as a kernel or a compiler.

    Args:
        seconds: Seconds from now.
        last_words: Prints the results so far; must not wait for the device.
    """

    def __init__(self, seconds: float, last_words: Callable[[], None]) -> None:
        self._last_words = last_words
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Stop the timer."""
        self._timer.cancel()

    def _end(self) -> None:
        try:
            self._last_words()
        finally:
            os._exit(1)


class DeviceClock:
    """Seconds per call by CUDA events. Calls are captured as one graph, which excludes the time of launches.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, calls: Sequence[Call], *, repeats: int, captured: bool) -> float:
        """Return the median over `repeats` of the mean time of the calls."""
        for call in (*calls, *calls):  # compiles, chooses algorithms, fills the allocator
            call()
        torch.cuda.synchronize(self.device)
        run = self._captured(calls) if captured else lambda: [call() for call in calls]
        for _ in range(2):
            run()
        found = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return statistics.median(found)

    def _captured(self, calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def peak_bytes(self, call: Call) -> int:
        """Return the peak of the memory allocated within a call, above the memory allocated before it."""
        call()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def name(self) -> str:
        """Return the device's name."""
        return torch.cuda.get_device_name(self.device)

    def cache_bytes(self) -> int:
        """Return the size of the last-level cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def register_bytes(self) -> int:
        """Return the size of one multiprocessor's registers."""
        return 4 * int(getattr(torch.cuda.get_device_properties(self.device), "regs_per_multiprocessor", 65_536))


class HostClock:
    """The same without a device, by the processor's clock, to test that everything runs."""

    device = torch.device("cpu")

    def seconds(self, calls: Sequence[Call], *, repeats: int, captured: bool) -> float:
        """Return the median over `repeats` of the mean time of the calls."""
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            found.append((time.perf_counter() - start) / len(calls))
        return statistics.median(found)

    def peak_bytes(self, call: Call) -> int:
        """Return 0; the peak is unknown here."""
        call()
        return 0

    def name(self) -> str:
        """Return a placeholder."""
        return "no device"

    def cache_bytes(self) -> int:
        """Return a size so small that inputs rotate."""
        return 1 << 12

    def register_bytes(self) -> int:
        """Return a size so small that nothing fits."""
        return 1 << 8


Clock = DeviceClock | HostClock


def bandwidth(clock: Clock, nbytes: int, repeats: int) -> float:
    """Return the bytes per second of a copy between two tensors of `nbytes`, counting reads and writes."""
    source = torch.ones(nbytes // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.seconds([lambda: target.copy_(source)], repeats=repeats, captured=False)
