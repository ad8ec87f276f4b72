"""Times on a device: of many calls over rotating inputs, between two events; and the time that a run may take."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


class Deadline:
    """When a run is to end.

    Args:
        seconds: From now.
    """

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.monotonic(), seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def passed(self, share: float = 1.0) -> bool:
        """Whether this share of the time is over."""
        return self.elapsed >= share * self._seconds


class Watchdog:
    """Ends the process where a call never comes back, which no deadline can: a kernel that hangs, a compiler.

    Args:
        seconds: From now.
        last_words: Prints what was found until then; must not wait for the device.
    """

    def __init__(self, seconds: float, last_words: Callable[[], None]) -> None:
        self._last_words = last_words
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Let the process be."""
        self._timer.cancel()

    def _end(self) -> None:
        try:
            self._last_words()
        finally:
            os._exit(1)


class DeviceClock:
    """Seconds per call by CUDA events. Calls are captured as one graph, so that no launch is waited for.

    Args:
        device: Where the calls compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, calls: Sequence[Call], *, repeats: int, captured: bool) -> float:
        """Median over `repeats` of the time of all calls together, for one of them."""
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
        """Most memory that was allocated at once within a call, above what was allocated before."""
        call()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def name(self) -> str:
        """The device's own name."""
        return torch.cuda.get_device_name(self.device)

    def cache_bytes(self) -> int:
        """Its last-level cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def register_bytes(self) -> int:
        """The registers of one multiprocessor."""
        return 4 * int(getattr(torch.cuda.get_device_properties(self.device), "regs_per_multiprocessor", 65_536))


class HostClock:
    """The same without a device, by the processor's clock: only to see that everything runs."""

    device = torch.device("cpu")

    def seconds(self, calls: Sequence[Call], *, repeats: int, captured: bool) -> float:
        """Median over `repeats` of the time of all calls together, for one of them."""
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            for call in calls:
                call()
            found.append((time.perf_counter() - start) / len(calls))
        return statistics.median(found)

    def peak_bytes(self, call: Call) -> int:
        """Not known here."""
        call()
        return 0

    def name(self) -> str:
        """What stands for the device."""
        return "no device"

    def cache_bytes(self) -> int:
        """So small that inputs rotate."""
        return 1 << 12

    def register_bytes(self) -> int:
        """So small that nothing fits."""
        return 1 << 8


Clock = DeviceClock | HostClock


def bandwidth(clock: Clock, nbytes: int, repeats: int) -> float:
    """Bytes per second of a copy between two tensors of `nbytes`, read and write counted."""
    source = torch.ones(nbytes // 4, device=clock.device)
    target = torch.empty_like(source)
    return 2 * nbytes / clock.seconds([lambda: target.copy_(source)], repeats=repeats, captured=False)
