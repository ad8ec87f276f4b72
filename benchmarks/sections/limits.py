"""The limits of this machine: training steps of BN + ReLU, and what limits them, in turns.

Forward must read x and write y, and backward must read x and dy and write dx. If each channel is spread over the whole
tensor (channels-last, and [N, C]), the inputs must be read once more, because y and dx depend on sums over all of them.
The simplest streams over the same tensors show how long memory takes for this, and our operators on data in the cache
how long the instructions take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import passes_in_turns
from benchmarks.subjects import in_cache, streams
from benchmarks.subjects.cases import DTYPES, LARGE, SMALL, STEP, Case, Data, layouts_of, make_data, shape_text
from benchmarks.subjects.peers import Passes, step_passes

KEY = ("shape", "layout", "dtype")
FLOOR, BY_CHANNEL = "floor", "channel by channel"
FORWARD, BACKWARD = PASSES = ("forward", "backward")
NON_TEMPORAL = {"": False, ", non-temporal": True}  # the endings of the streams' names


def _streams(case: Case, data: Data) -> dict[str, Passes]:
    """Return the streams over the tensors of a step, with ordinary and with non-temporal stores."""
    x, dy = data.x.detach(), data.dy
    y, dx = torch.empty_like(x), torch.empty_like(x)
    found = {}
    for ending, non_temporal in NON_TEMPORAL.items():

        def forward(non_temporal: bool = non_temporal) -> None:
            if case.spreads:
                streams.read(x)
            streams.map_to(y, x, non_temporal=non_temporal)

        def backward(_: Any, non_temporal: bool = non_temporal) -> None:
            if case.spreads:
                streams.read(x, dy)
            streams.map_to(dx, x, dy, non_temporal=non_temporal)

        def forward_by_channel(non_temporal: bool = non_temporal) -> None:
            streams.channels_to(y, x, non_temporal=non_temporal)

        def backward_by_channel(_: Any, non_temporal: bool = non_temporal) -> None:
            streams.channels_to(dx, x, dy, non_temporal=non_temporal)

        found[FLOOR + ending] = Passes(forward, backward)
        if not case.spreads:
            found[BY_CHANNEL + ending] = Passes(forward_by_channel, backward_by_channel)
    return found


def _cases(options: Options) -> Iterator[Case]:
    for shape in SMALL[:1] if options.quick else LARGE:
        for dtype in DTYPES:
            for layout in layouts_of(shape):
                yield Case(shape, layout, dtype, STEP)


def measure_limits(options: Options, table: Table) -> None:
    """Write the time of each pass of our step, torch's, the streams, and our operators in the cache."""
    if streams.library() is None:
        return
    done = table.measured()
    for case in _cases(options):
        key = (shape_text(case.shape), case.layout, case.dtype)
        if key in done or options.only not in ", ".join(key):
            continue
        data = make_data(case)
        small = in_cache.in_cache(case)
        passes = step_passes(case, data) | _streams(case, data)
        passes |= {name: in_cache.repeated_passes(own) for name, own in small.items()}
        calls = {name: (p.forward, p.backward) for name, p in passes.items()}
        times = passes_in_turns(calls, options.seconds, least=2 if options.quick else 9)
        where: Row = dict(zip(KEY, key, strict=True)) | {"threads": options.threads}
        rows: list[Row] = []
        for name, both in times.items():
            size, repeats = (small[name].nbytes, in_cache.REPEATS) if name in small else (case.nbytes, 1)
            for pass_, own in zip(PASSES, both, strict=True):
                row = where | {"bytes": size, "contender": name, "pass": pass_, "samples": len(own.seconds)}
                rows.append(row | {f"p{p}_ms": own.percentile(p) * 1e3 / repeats for p in (20, 50, 80)})
        table.append(rows)
        steps = ", ".join(f"{n} {1e3 * (a.median + b.median):.3g}" for n, (a, b) in times.items() if n not in small)
        print(f"{', '.join(key)}: {steps} ms", flush=True)
