"""Training steps of third-party networks before and after `batchnorm.accelerate`, in alternation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import torch

from batchnorm.surgery.accelerate.accelerate import accelerate
from benchmarks import zoo
from benchmarks.options import Options
from benchmarks.records import Row, Table
from benchmarks.steps import check_gradients, training_step
from benchmarks.timing import in_rounds, with_interval

KEY = ("network", "layout", "round")
CONTENDERS = ("torch", "accelerated")
BATCH, SIZE = 16, 96
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def measure_accelerate(options: Options, table: Table) -> None:
    """Write one row for each round."""
    done = table.measured()
    batch, size, rounds = (4, 64, 2) if options.quick else (BATCH, SIZE, options.rounds)
    built = zoo.timed("resnet18", "mobilenet_v2", "densenet121")
    for network, build in list(built.items())[: 1 if options.quick else None]:
        if options.only not in network:
            continue
        torch.manual_seed(0)
        model, images, labels = build(), torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
        fast, report = accelerate(model, images[:2])
        check_gradients(copy.deepcopy(model).double(), copy.deepcopy(fast).double())
        for layout, memory in LAYOUTS.items():
            left = [i for i in range(rounds) if (network, layout, str(i)) not in done]
            if not left:
                continue
            x = images.contiguous(memory_format=memory)
            calls = {
                name: training_step(copy.deepcopy(m).to(memory_format=memory), x, labels)
                for name, m in zip(CONTENDERS, (model, fast), strict=True)
            }
            where: Row = {
                "network": network,
                "layout": layout,
                "batch": batch,
                "size": size,
                "threads": options.threads,
            }
            where |= {"changed": len(report.changed), "fused": len(report.fused or {})}
            _measure(calls, where, left, table)


def _measure(calls: dict[str, Callable[[], None]], where: Row, left: list[int], table: Table) -> None:
    rows: list[Row] = []
    for i, milliseconds in in_rounds(calls, left):
        rows.append({**where, "round": i, **milliseconds})
        table.append(rows[-1:])
    times, low, high = times_as_fast(rows)
    medians = ", ".join(f"{name} {np.median([r[f'{name}_ms'] for r in rows]):.4g} ms" for name in CONTENDERS)
    print(
        f"{where['network']}, {where['layout']}: {medians}; {times:.2f} times as fast ({low:.2f} to {high:.2f})",
        flush=True,
    )


def times_as_fast(rows: Iterable[Row]) -> tuple[float, float, float]:
    """Return torch's time divided by the accelerated network's, and its 95 % interval.

    The median of the ratios within a round; the interval is the percentile bootstrap over rounds.
    """
    torch_name, our_name = (f"{name}_ms" for name in CONTENDERS)
    ratios = np.array([float(r[torch_name]) / float(r[our_name]) for r in rows])
    return with_interval(ratios, lambda sample: np.median(sample, axis=-1))
