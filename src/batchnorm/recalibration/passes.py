"""Measure the moments of all layers in one pass over the data, or layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from batchnorm.distributed.owners import sharded_modules
from batchnorm.models.data.batches import Forward, MaskOf, ThreadSettings, as_tensors, own_copy, size_of, tensors_in
from batchnorm.models.execution.observe import LayerCall, Observer, Pass, Rows, Statistics, merged, running_statistics
from batchnorm.models.execution.processes import Processes
from batchnorm.models.execution.progress import Bar
from batchnorm.moments import Moments
from batchnorm.nn.domain import keep_domain
from batchnorm.recalibration.memory import Alive
from batchnorm.recalibration.paused import Paused, Stopped
from batchnorm.recalibration.rereading import RepeatableBatches
from batchnorm.undo import Steps, Undo
from batchnorm.walk import Found

# The limit on threads. Each waiting pass is a thread, which starts its own pool of torch's threads.
_MOST_THREADS = 1024

StatisticsFor = Callable[[LayerCall, Rows], Statistics]


@dataclass(frozen=True)
class Measured:
    """The moments of layer inputs, and the amount of data: of this process, or of all processes together."""

    calls: dict[LayerCall, Rows]
    batches: int
    samples: int
    kept: int = 0

    def of_layer(self, number: int) -> tuple[Rows, ...]:
        """Return the moments of the layer's calls, in order."""
        return tuple(rows for call, rows in sorted(self.calls.items()) if call.layer == number)


@dataclass(frozen=True)
class Run:
    """A model, its data, and the settings for its forward passes."""

    model: nn.Module
    observer: Observer
    batches: RepeatableBatches
    forward: Forward
    mask_of: MaskOf | None
    device: torch.device | None
    ambient: ThreadSettings
    bar: Bar

    def start(self, batch: Any, statistics_for: StatisticsFor) -> tuple[Pass, Callable[[], None]]:
        """Return the forward pass of a batch, and a function that runs it."""
        batch = own_copy(batch, self.device)
        forward_pass = Pass(statistics_for, None if self.mask_of is None else self.mask_of(batch))
        _, domain = keep_domain()  # the domain of this thread, for the thread that runs the pass

        def work() -> None:
            with self.ambient.entered(), domain:
                self.forward(self.model, batch)

        return forward_pass, work

    def run_pass(self, batch: Any, statistics_for: StatisticsFor) -> None:
        """Run the forward pass of a batch."""
        self.observer.current, work = self.start(batch, statistics_for)
        try:
            work()
        finally:
            self.batches.shape = self.observer.current.shape
            self.observer.current = None


def _has_one_value(moments: Moments) -> bool:
    squares = moments.count if moments.count_squares is None else moments.count_squares
    return bool(moments.count**2 <= squares * (1 + 1e-12))


def _batch_statistics(found: Found, rows: Rows, *, strict: bool = True) -> Statistics:
    """Return the batch's statistics, by which training would normalize."""
    statistics = running_statistics(found.module)
    for row, moments in enumerate(rows):
        if moments.count == 0:
            continue
        if _has_one_value(moments):
            if not strict or getattr(found.module, "on_single", "error") == "running":
                continue
            raise ValueError(
                f"recalibrate expects more than one value per channel in every batch, got one at {found.path!r}. "
                "One value has no variance: use larger batches, drop the last (drop_last=True), or use "
                "passes='sequential', which normalizes by the population and accepts any batch."
            )
        statistics.mean[row], statistics.var[row] = moments.mean, moments.var
    return statistics


def single(run: Run, processes: Processes) -> Measured:
    """Measure all layers in one pass; each batch is normalized by its own statistics, as in training."""
    layers = run.observer.layers

    calls: dict[LayerCall, Rows] = {}

    def statistics_for(call: LayerCall, rows: Rows) -> Statistics:
        calls[call] = merged(calls[call], rows) if call in calls else rows
        return _batch_statistics(layers[call.layer], rows)

    batches = processes.in_step(run.batches) if sharded_modules(run.model) else run.batches
    for batch in run.bar.over(batches, "recalibrate", run.batches.length):
        run.run_pass(batch, statistics_for)
    return _merged_over_ranks(processes.gather(_of_this_process(run, calls)))


def _of_this_process(run: Run, calls: dict[LayerCall, Rows]) -> Measured:
    """Return the moments on the CPU, where other processes can use them, and the amount of data."""
    on_cpu = {
        call: tuple(Moments.empty(len(moments.mean), device="cpu").merge(moments) for moments in rows)
        for call, rows in calls.items()
    }
    return Measured(on_cpu, run.batches.count, run.batches.samples)


def _merged_over_ranks(parts: list[Measured]) -> Measured:
    order = dict.fromkeys(call for part in parts for call in part.calls)
    calls = {call: merged(*(part.calls[call] for part in parts if call in part.calls)) for call in order}
    return Measured(calls, sum(part.batches for part in parts), sum(part.samples for part in parts))


class _WaitingPass:
    """A forward pass that waits at the first layer whose statistics are not yet known."""

    def __init__(self, run: Run, batch: Any, statistics: dict[LayerCall, Statistics]) -> None:
        self._observer, self._batches = run.observer, run.batches
        self._statistics = statistics
        self.at: tuple[LayerCall, Rows] | None = None
        self._pass, work = run.start(batch, self._statistics_for)
        self._paused = Paused(work)
        self.stop, self.wait = self._paused.stop, self._paused.wait

    def _statistics_for(self, call: LayerCall, rows: Rows) -> Statistics:
        if call not in self._statistics:
            self.at = call, rows
            self._paused.pause()
            self.at = None
        return self._statistics[call]

    def resume(self) -> None:
        """Run until the next layer with unknown statistics, or until the end."""
        self._observer.current = self._pass
        try:
            self._paused.resume()
        finally:
            self._batches.shape = self._pass.shape
            self._observer.current = None


class _SequentialPasses(Undo):
    """The forward passes of one process. Some wait between layers; the others start again for every layer.

    At the end of the block, those that still wait are stopped.
    """

    def __init__(self, run: Run, cache_bytes: int) -> None:
        self._run = run
        self._free = cache_bytes
        workers = torch.get_num_threads() if run.device is None or run.device.type == "cpu" else 1
        self._places = max(1, _MOST_THREADS // workers)
        self.kept: list[_WaitingPass] = []
        self.statistics: dict[LayerCall, Statistics] = {}

    def first(self) -> Measured:
        """Read the data, keep as many passes as fit into memory, and measure the input of the first layer."""
        reached: list[tuple[LayerCall, Rows]] = []
        estimate = _MemoryEstimate(self._run)
        for batch in self._run.bar.over(
            self._run.batches, f"layer 1 of {len(self._run.observer.layers)}", self._run.batches.length
        ):
            need = estimate.bytes_for(batch)
            if need <= self._free and len(self.kept) < self._places:
                self._free -= need
                self.kept.append(_WaitingPass(self._run, batch, self.statistics))
                self.kept[-1].resume()
            else:
                self._free = -1  # keep no more, because the kept passes must be those of the first batches
                reached += self._run_to_unknown(batch)
        return self._joined(reached)

    def next(self) -> Measured:
        """Continue to the next layers with unknown statistics, and measure their inputs."""
        reached: list[tuple[LayerCall, Rows]] = []
        known, layers = len({call.layer for call in self.statistics}), len(self._run.observer.layers)
        title = f"layer {min(known + 1, layers)} of {layers}"
        restarted = self._run.batches.count - len(self.kept)
        for kept in self._run.bar.over(self.kept, title, len(self.kept) + restarted):
            if kept.at is not None and kept.at[0] in self.statistics:
                kept.resume()
        if restarted > 0:
            for batch in self._run.bar.over(self._run.batches.again(len(self.kept)), title, restarted):
                reached += self._run_to_unknown(batch)
        return self._joined(reached)

    def undo(self, error: BaseException | None) -> Steps:
        """Return the steps that stop the passes."""
        return [("stopping a forward pass", kept.stop) for kept in self.kept]

    def wait(self) -> None:
        """Wait until all passes have ended."""
        for kept in self.kept:
            kept.wait()

    def _run_to_unknown(self, batch: Any) -> list[tuple[LayerCall, Rows]]:
        reached: list[tuple[LayerCall, Rows]] = []

        def statistics_for(call: LayerCall, rows: Rows) -> Statistics:
            if call in self.statistics:
                return self.statistics[call]
            reached.append((call, rows))
            raise Stopped

        with suppress(Stopped):
            self._run.run_pass(batch, statistics_for)
        return reached

    def _joined(self, reached: list[tuple[LayerCall, Rows]]) -> Measured:
        calls: dict[LayerCall, Rows] = {}
        for call, rows in (*(kept.at for kept in self.kept if kept.at is not None), *reached):
            calls[call] = merged(calls[call], rows) if call in calls else rows
        return _of_this_process(self._run, calls)


class _MemoryEstimate:
    """Estimates the memory of a waiting pass from a measurement of the first pass."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: tuple[int, int] | None = None

    def bytes_for(self, batch: Any) -> int:
        """Return the most that the pass of the batch holds at a layer, including its copy of the batch."""
        if self._first is None:
            self._first = size_of(batch), self._measured_peak(batch)
        size, peak = self._first
        return peak * size_of(batch) // size if size else peak

    def _measured_peak(self, batch: Any) -> int:
        layers = self._run.observer.layers
        model = self._run.model
        alive = Alive((*model.parameters(), *model.buffers(), *tensors_in(as_tensors(batch))))

        def statistics_for(call: LayerCall, rows: Rows) -> Statistics:
            alive.update_peak()
            return _batch_statistics(layers[call.layer], rows, strict=False)

        with alive:
            self._run.run_pass(batch, statistics_for)
        return alive.peak


def sequential(
    run: Run, processes: Processes, new_statistics: Callable[[int, Rows, int], Statistics], cache_bytes: int
) -> Measured:
    """Measure one layer after another; each gets the output of the recalibrated layers before it.

    Args:
        run: The model and its data.
        processes: The processes that recalibrate together.
        new_statistics: Returns a layer's new statistics, from its number, its moments and the number of samples.
        cache_bytes: The limit on the memory of waiting passes.
    """
    passes = _SequentialPasses(run, cache_bytes)
    calls: dict[LayerCall, Rows] = {}
    work = passes.first
    try:
        with passes:
            while True:
                reached = _merged_over_ranks(processes.gather(work()))
                # Batches may take different paths through the model and reach different calls: handle one at a time.
                call = next(iter(reached.calls), None)
                if call is None:
                    return replace(reached, calls=calls, kept=len(passes.kept))
                calls[call] = reached.calls[call]
                so_far = [rows for earlier, rows in calls.items() if earlier.layer == call.layer]
                passes.statistics[call] = new_statistics(call.layer, merged(*so_far), reached.samples)
                work = passes.next
    finally:
        passes.wait()
