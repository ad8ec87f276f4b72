"""Times of single layers: every case, tensors from 1 KB to 400 MB, and thread counts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import Times, alternate
from benchmarks.subjects.cases import (
    DTYPES,
    JUDGED_BY_DEFAULT,
    LARGE,
    SMALL,
    STEP,
    TASKS,
    TOLERANCE,
    Case,
    Data,
    errors,
    layouts_of,
    make_data,
    shape_text,
)
from benchmarks.subjects.peers import COMPILED, CONTENDERS, OURS, TORCH, Contender
from benchmarks.subjects.streams import CLONE, COPY, NON_TEMPORAL, copies_of

KEY = ("allocator", "threads", "shape", "layout", "dtype", "task")


def cases(options: Options) -> Iterator[Case]:
    """Yield the cases of an allocator setting; cases with the same data follow one another."""
    shapes = SMALL[:1] if options.quick else LARGE + SMALL
    for shape in shapes:
        for dtype in DTYPES:
            for task in TASKS:
                if options.quick and dtype != "float32" and task != STEP:
                    continue
                if options.allocator == "default" and shape in LARGE and task not in JUDGED_BY_DEFAULT:
                    continue
                for layout in layouts_of(shape):
                    yield Case(shape, layout, dtype, task)


def size_cases(options: Options) -> Iterator[Case]:
    """Yield [8, 32, S, 1] from 1 KB to 400 MB."""
    for kilobytes in (1, 16, 256) if options.quick else (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 131072, 400000):
        yield Case((8, 32, kilobytes, 1), "contiguous", "float32", STEP)


def _agreeing(contender: Contender, case: Case, data: Data) -> tuple[Callable[[], Any], dict[str, float]] | None:
    """Return the contender's call and its errors, or None if it does not do the case or is wrong (which is printed)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the peers
        call = contender.build(case, data)
        if call is None:
            return None
        found = errors(case, data, contender.as_torch(case, call()))
    worst = max(found, key=lambda name: found[name])
    if found[worst] <= TOLERANCE[case.dtype]:
        return call, found
    print(
        f"not reported: {contender.name} is wrong in {worst} by {found[worst]:.1e} of its maximum, "
        f"{TOLERANCE[case.dtype]:.0e} allowed ({describe(case)})",
        flush=True,
    )
    return None


def describe(case: Case) -> str:
    return f"{case.task_name}, {shape_text(case.shape)}, {case.layout}, {case.dtype}"


def measure(case: Case, options: Options, names: tuple[str, ...] | None = None) -> list[Row]:
    """Return a row for each contender of the case that agrees with the reference, and for each copy."""
    data = make_data(case)
    calls: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, float]] = {}
    for contender in CONTENDERS:
        skipped = contender.name == COMPILED and (options.quick or case.shape in SMALL)
        if skipped or (names is not None and contender.name not in names):
            continue
        agreeing = _agreeing(contender, case, data)
        if agreeing is not None:
            calls[contender.name], found[contender.name] = agreeing
    calls |= copies_of(data.x)
    times = alternate(calls, options.seconds, least=2 if options.quick else 5)
    return [_row(case, options, name, t, times, found.get(name, {})) for name, t in times.items()]


def _row(case: Case, options: Options, name: str, own: Times, times: dict[str, Times], found: dict[str, float]) -> Row:
    copy = min(times[n].median for n in (COPY, NON_TEMPORAL) if n in times)
    fault = max(0.0, times[CLONE].median - times[COPY].median)  # the cost of new memory
    floor = copy * case.task.traffic / 2
    is_copy = name in (COPY, NON_TEMPORAL, CLONE)
    return {
        "allocator": options.allocator,
        "threads": torch.get_num_threads(),
        "shape": shape_text(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "task": case.task_name,
        "bytes": case.nbytes,
        "contender": name,
        "samples": len(own.seconds),
        **{f"p{p}_ms": own.percentile(p) * 1e3 for p in (20, 50, 80)},
        "floor_ms": floor * 1e3,
        "floor_read_twice_ms": copy * case.task.traffic_read_twice / 2 * 1e3,
        "floor_new_memory_ms": (floor + fault * case.task.allocations) * 1e3,
        "share_of_floor": "" if is_copy else floor / own.median,
        "error_y": found.get("y", ""),
        "error_dx": found.get("dx", ""),
    }


def _measure_all(chosen: Iterator[Case], options: Options, table: Table, names: tuple[str, ...] | None = None) -> None:
    done = table.measured()
    for case in chosen:
        key = (options.allocator, torch.get_num_threads(), shape_text(case.shape), case.layout, case.dtype)
        if (*map(str, key), case.task_name) in done:
            continue
        rows = measure(case, options, names)
        table.append(rows)
        medians = ", ".join(f"{r['contender']} {r['p50_ms']:.3g}" for r in rows)
        print(f"{options.allocator}: {describe(case)}: {medians} ms", flush=True)


def measure_layers(options: Options, table: Table) -> None:
    """Measure every case of this allocator setting."""
    _measure_all((c for c in cases(options) if options.only in describe(c)), options, table)


def measure_sizes(options: Options, table: Table) -> None:
    """Measure a training step of BN + ReLU against the tensor's size."""
    _measure_all(size_cases(options), options, table, (OURS, TORCH))


def measure_threads(options: Options, table: Table) -> None:
    """Measure a training step of BN + ReLU against the number of threads: up to the cores, and twice as many."""
    case = Case(SMALL[0] if options.quick else (32, 256, 56, 56), "contiguous", "float32", STEP)
    cores = os.cpu_count() or 1
    before = torch.get_num_threads()
    for threads in (*range(1, cores + 1), 2 * cores):
        torch.set_num_threads(threads)
        _measure_all(iter([case]), options, table, (OURS, TORCH))
    torch.set_num_threads(before)
