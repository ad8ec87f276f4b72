"""Tables of whole networks: a training step and inference, the gain of keeping memory, and a summary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.measuring.records import Row, select
from benchmarks.reports.markdown import markdown
from benchmarks.sections import steps
from benchmarks.sections.steps import ACCELERATED, CONTENDERS, CPU, DEFAULT, ELAPSED, KEPT, NONE, TASKS, TORCH, TRAINING

_CELL = ("network", "layout", "precision")


def texts(rows: list[Row]) -> dict[str, str]:
    """Return the text of each file, by its name without the suffix."""
    found = {}
    for task, name in zip(TASKS, ("networks-training", "networks-inference"), strict=True):
        own = list(select(rows, task=task))
        found |= {name: _cells(own, KEPT)} if any(r["allocator"] == KEPT for r in own) else {}
    training = list(select(rows, task=TRAINING))
    if {r["allocator"] for r in training} >= {DEFAULT, KEPT}:
        found |= {"networks-memory": _memory(training), "networks-summary": _summary(training)}
    return found


def _by_cell(rows: list[Row], allocator: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in select(rows, allocator=allocator):
        found.setdefault(tuple(row[k] for k in _CELL), []).append(row)
    return found


def _both(rows: list[Row]) -> dict[tuple[str, ...], tuple[list[Row], list[Row]]]:
    """Return the rows with default memory and with memory kept, for the cells that have both."""
    default, kept = _by_cell(rows, DEFAULT), _by_cell(rows, KEPT)
    return {cell: (own, kept[cell]) for cell, own in default.items() if cell in kept}


def _times(measured: tuple[float, float, float]) -> str:
    value, low, high = measured
    return f"{value:.2f}× ({low:.2f} to {high:.2f})"


def _cells(rows: list[Row], allocator: str) -> str:
    """Return times, the share of normalization, the speedup, and the share of the possible gain."""
    body = []
    for (network, *where), own in _by_cell(rows, allocator).items():
        row = own[0]
        name = f"{network}, {row['batch']}×3×{row['size']}×{row['size']} ({row['fused']} of {row['layers']})"
        medians = dict(zip(CONTENDERS, np.median(steps.milliseconds(own, ELAPSED), axis=0), strict=True))
        times = [f"{medians[contender]:.4g}" for contender in (NONE, TORCH, ACCELERATED)]
        speedups = [_times(steps.speedup(own, kind)) for kind in (ELAPSED, CPU)]
        before, after = steps.share_of_norm(own, CPU)
        gain = steps.share_of_gain(own, CPU)
        share = "" if gain is None else "{:.0%} ({:.0%} to {:.0%})".format(*gain)
        body.append([name, *where, *times, *speedups, f"{before:.0%} → {after:.0%}", share, str(len(own))])
    head = ("network (layers fused)", *_CELL[1:], "no BN, ms", "torch, ms", "accelerated, ms", "speedup")
    return markdown((*head, "speedup, CPU time", "BN's share, CPU time", "share of possible gain", "rounds"), body, 3)


_WAYS = {
    "`keep_memory`": lambda default, kept: steps.speedup_between(default, kept, TORCH, CPU),
    "`accelerate`": lambda default, kept: steps.speedup(default, CPU),
    "both": lambda default, kept: steps.speedup_between(default, kept, ACCELERATED, CPU),
}


def _memory(rows: list[Row]) -> str:
    """Return the speedups over torch with default memory: memory kept, accelerated, and both."""
    body = [[*cell, *(_times(way(*pair)) for way in _WAYS.values())] for cell, pair in _both(rows).items()]
    return markdown((*_CELL, *_WAYS), body, 3)


def _summary(rows: list[Row]) -> str:
    """Return the same for each network: the geometric mean over layouts and precisions, and the range."""
    body = []
    cells = _both(rows)
    for network in dict.fromkeys(cell[0] for cell in cells):
        pairs = [pair for cell, pair in cells.items() if cell[0] == network]
        body.append([network, *(_range(way(*pair)[0] for pair in pairs) for way in _WAYS.values())])
    return markdown(("network", *_WAYS), body)


def _range(values: Iterable[float]) -> str:
    found = np.array(list(values))
    return f"{np.exp(np.log(found).mean()):.2f}× ({found.min():.2f} to {found.max():.2f})"
