"""One pass over the data for all layers, or one layer after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from batchnorm.models.batches import Ambient, Forward, MaskOf, moved
from batchnorm.models.memory import Alive, size_of, tensors_in
from batchnorm.models.observe import LayerCall, Observer, Pass, Rows, Statistics, merged, running_statistics
from batchnorm.models.processes import Processes
from batchnorm.models.progress import Bar
from batchnorm.moments import Moments
from batchnorm.nn.domain import keep_domain
from batchnorm.recalibrate.paused import Paused, Stopped
from batchnorm.recalibrate.rereading import RepeatableBatches
from batchnorm.walk import Found

# Each kept pass has a thread, and each thread of the CPU's own pool has as many again.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Measured:
    """What all ranks measured together."""

    calls: dict[LayerCall, Rows]
    batches: int
    samples: int
    kept: int = 0

    def of_layer(self, number: int) -> tuple[Rows, ...]:
        """The moments of the layer's first call, its second, and so on."""
        return tuple(rows for call, rows in sorted(self.calls.items()) if call.layer == number)


@dataclass(frozen=True)
class Run:
    """What one batch needs to go through the model."""

    model: nn.Module
    observer: Observer
    batches: RepeatableBatches
    forward: Forward
    mask_of: MaskOf | None
    device: torch.device | None
    ambient: Ambient
    bar: Bar

    def start(self, batch: Any, meet: Callable[[LayerCall, Rows], Statistics]) -> tuple[Pass, Callable[[], None]]:
        """The pass of a batch, and what is to be called to do it."""
        batch = moved(batch, self.device)
        going = Pass(meet, None if self.mask_of is None else self.mask_of(batch))
        _, domain = keep_domain()  # of this thread, in whichever the work is done

        def work() -> None:
            with self.ambient.entered(), domain:
                self.forward(self.model, batch)

        return going, work

    def do(self, batch: Any, meet: Callable[[LayerCall, Rows], Statistics]) -> None:
        """Send a batch through the model."""
        self.observer.current, work = self.start(batch, meet)
        try:
            work()
        finally:
            self.observer.current = None


def _one_value(moments: Moments) -> bool:
    squares = moments.count if moments.count_squares is None else moments.count_squares
    return bool(moments.count**2 <= squares * (1 + 1e-12))


def _of_batch(found: Found, rows: Rows, *, strict: bool = True) -> Statistics:
    """What training would normalize by: the batch's own statistics."""
    statistics = running_statistics(found.module)
    for row, moments in enumerate(rows):
        if moments.count == 0:
            continue
        if _one_value(moments):
            if not strict:
                continue
            raise ValueError(
                f"recalibrate expects more than one value per channel in every batch, got one at {found.path!r}. "
                "One value has no variance: use larger batches, drop the last (drop_last=True), or "
                "passes='sequential', which normalizes by the population and takes any batch."
            )
        statistics.mean[row], statistics.var[row] = moments.mean, moments.var
    return statistics


def single(run: Run, processes: Processes) -> Measured:
    """All layers in one pass, each batch normalized by its own statistics, as in training."""
    layers = run.observer.layers

    def measure() -> tuple[dict[LayerCall, Rows], int, int]:
        calls: dict[LayerCall, Rows] = {}

        def meet(call: LayerCall, rows: Rows) -> Statistics:
            calls[call] = merged(calls[call], rows) if call in calls else rows
            return _of_batch(layers[call.layer], rows)

        for batch in run.bar.over(run.batches, "recalibrate", run.batches.length):
            run.do(batch, meet)
        return _on_cpu(calls), run.batches.count, run.batches.samples

    parts = processes.gather(measure)
    return Measured(_over_ranks([p[0] for p in parts]), sum(p[1] for p in parts), sum(p[2] for p in parts))


def _on_cpu(calls: dict[LayerCall, Rows]) -> dict[LayerCall, Rows]:
    """The same where every rank can have it: a rank's GPU is not the others'."""
    return {
        call: tuple(Moments.empty(len(moments.mean), device="cpu").merge(moments) for moments in rows)
        for call, rows in calls.items()
    }


def _over_ranks(parts: list[dict[LayerCall, Rows]]) -> dict[LayerCall, Rows]:
    calls = dict.fromkeys(call for part in parts for call in part)
    return {call: merged(*(part[call] for part in parts if call in part)) for call in calls}


class _Kept:
    """A pass that waits where the next layer's statistics are not known yet."""

    def __init__(self, run: Run, batch: Any, statistics: dict[LayerCall, Statistics]) -> None:
        self._observer = run.observer
        self._statistics = statistics
        self.at: tuple[LayerCall, Rows] | None = None
        self._pass, work = run.start(batch, self._meet)
        self._paused = Paused(work)
        self.stop = self._paused.stop

    def _meet(self, call: LayerCall, rows: Rows) -> Statistics:
        if call not in self._statistics:
            self.at = call, rows
            self._paused.pause()
            self.at = None
        return self._statistics[call]

    def go_on(self) -> None:
        """Run until the next such layer, or the end."""
        self._observer.current = self._pass
        try:
            self._paused.resume()
        finally:
            self._observer.current = None


class _Sequence:
    """The passes of one process: those kept, and those that start anew for every layer."""

    def __init__(self, run: Run, cache_bytes: int) -> None:
        self._run = run
        self._free = cache_bytes
        workers = torch.get_num_threads() if run.device is None or run.device.type == "cpu" else 1
        self._places = max(1, _MOST_THREADS // workers)
        self.kept: list[_Kept] = []
        self.statistics: dict[LayerCall, Statistics] = {}

    def first(self) -> tuple[dict[LayerCall, Rows], int, int]:
        """Read the data, keep what there is room for, and return what the first layer is given, of how much data."""
        reached: list[tuple[LayerCall, Rows]] = []
        needed = _Need(self._run)
        for batch in self._run.bar.over(
            self._run.batches, f"layer 1 of {len(self._run.observer.layers)}", self._run.batches.length
        ):
            need = needed.by(batch)
            if need <= self._free and len(self.kept) < self._places:
                self._free -= need
                self.kept.append(_Kept(self._run, batch, self.statistics))
                self.kept[-1].go_on()
            else:
                self._free = -1  # the kept ones are the first
                reached += self._reach(batch)
        return self._joined(reached)

    def next(self) -> tuple[dict[LayerCall, Rows], int, int]:
        """Go on to the layers whose statistics are not known, and return the same of them."""
        reached: list[tuple[LayerCall, Rows]] = []
        known, layers = len({call.layer for call in self.statistics}), len(self._run.observer.layers)
        title = f"layer {min(known + 1, layers)} of {layers}"
        anew = self._run.batches.count - len(self.kept)
        for kept in self._run.bar.over(self.kept, title, len(self.kept) + anew):
            if kept.at is not None and kept.at[0] in self.statistics:
                kept.go_on()
        if anew > 0:
            for batch in self._run.bar.over(self._run.batches.again(len(self.kept)), title, anew):
                reached += self._reach(batch)
        return self._joined(reached)

    def stop(self) -> None:
        """End what still waits."""
        for kept in self.kept:
            kept.stop()

    def _reach(self, batch: Any) -> list[tuple[LayerCall, Rows]]:
        reached: list[tuple[LayerCall, Rows]] = []

        def meet(call: LayerCall, rows: Rows) -> Statistics:
            if call in self.statistics:
                return self.statistics[call]
            reached.append((call, rows))
            raise Stopped

        with suppress(Stopped):
            self._run.do(batch, meet)
        return reached

    def _joined(self, reached: list[tuple[LayerCall, Rows]]) -> tuple[dict[LayerCall, Rows], int, int]:
        calls: dict[LayerCall, Rows] = {}
        for call, rows in (*(kept.at for kept in self.kept if kept.at is not None), *reached):
            calls[call] = merged(calls[call], rows) if call in calls else rows
        return _on_cpu(calls), self._run.batches.count, self._run.batches.samples


class _Need:
    """Estimates what keeping a batch costs, from what the first one was seen to keep."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._first: tuple[int, int] | None = None

    def by(self, batch: Any) -> int:
        """Bytes: of the batch itself, and the most that its pass holds on to at a layer."""
        if self._first is None:
            self._first = size_of(batch), self._seen(batch)
        size, seen = self._first
        return size_of(batch) + (seen * size_of(batch) // size if size else seen)

    def _seen(self, batch: Any) -> int:
        layers = self._run.observer.layers
        batch = moved(batch, self._run.device)
        model = self._run.model
        alive = Alive((*model.parameters(), *model.buffers(), *tensors_in(batch)))

        def meet(call: LayerCall, rows: Rows) -> Statistics:
            alive.update_peak()
            return _of_batch(layers[call.layer], rows, strict=False)

        with alive:
            self._run.do(batch, meet)
        return alive.peak


def sequential(
    run: Run, processes: Processes, settle: Callable[[int, Rows, int], Statistics], cache_bytes: int
) -> Measured:
    """One layer after the other, each given what the calibrated layers before it put out.

    Args:
        run: How batches go through the model.
        processes: The processes that recalibrate together.
        settle: The statistics that a layer is to have after these moments of so many samples.
        cache_bytes: How much memory the passes that wait may take.
    """
    here = _Sequence(run, cache_bytes)
    calls: dict[LayerCall, Rows] = {}
    work = here.first
    try:
        while True:
            parts = processes.gather(work)
            reached = [part[0] for part in parts]
            batches, samples = sum(part[1] for part in parts), sum(part[2] for part in parts)
            # Where the data choose the way through the model, one call after the other has its turn.
            call = next((call for part in reached for call in part), None)
            if call is None:
                return Measured(calls, batches, samples, len(here.kept))
            calls[call] = _over_ranks(reached)[call]
            so_far = [rows for earlier, rows in calls.items() if earlier.layer == call.layer]
            here.statistics[call] = settle(call.layer, merged(*so_far), samples)
            work = here.next
    finally:
        here.stop()
