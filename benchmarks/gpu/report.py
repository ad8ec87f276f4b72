"""The short table at the end of a run on a GPU, and whether the targets were met."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.gpu.layers import COMPILED, CONTENDERS, OURS, TORCH
from benchmarks.measuring.records import Row
from benchmarks.reports.targets import geometric_mean

_CELL = ("shape", "layout", "dtype", "task")


def _layers(rows: list[Row]) -> list[Row]:
    return [r for r in rows if "floor_ms" in r]


def ratios(rows: list[Row], peer: str, *, task: str | None = None, read_once: bool = False) -> list[float]:
    """Return the peer's time over ours in every case with both."""
    ours = {tuple(r[k] for k in _CELL): r for r in _layers(rows) if r["contender"] == OURS}
    return [
        r["ms"] / ours[cell]["ms"]
        for r in _layers(rows)
        if r["contender"] == peer
        and (cell := tuple(r[k] for k in _CELL)) in ours
        and task in (None, r["task"])
        and (r["read_once"] or not read_once)
    ]


def _shares(rows: Iterable[Row]) -> list[float]:
    return [r["share_of_floor"] for r in rows if r["contender"] == OURS and r["beyond_cache"]]


def _network(rows: list[Row], column: str) -> list[float]:
    """Return torch's value for a whole network over ours, if both are known."""
    found = {r["contender"]: r[column] for r in rows if "floor_ms" not in r}
    return [found[TORCH] / found[OURS]] if found.get(OURS) and found.get(TORCH) else []


def targets(rows: list[Row]) -> list[tuple[str, float, float]]:
    """Return each target: its description, the smallest value that meets it, and the measurement (NaN if none)."""
    plain, added = ratios(rows, TORCH, task="BN+ReLU"), ratios(rows, TORCH, task="BN+add+ReLU")
    nan = float("nan")
    return [
        ("share of the floor beyond the cache, mean", 0.85, geometric_mean(_shares(_layers(rows)))),
        ("torch / ours, BN+ReLU, mean", 1.4, geometric_mean(plain)),
        ("torch / ours, BN+ReLU, least", 1.0, min(plain, default=nan)),
        ("torch / ours, BN+add+ReLU, mean", 1.35, geometric_mean(added)),
        (
            "torch / ours, BN+add+ReLU where one read suffices, mean",
            1.8,
            geometric_mean(ratios(rows, TORCH, task="BN+add+ReLU", read_once=True)),
        ),
        ("torch.compile / ours, mean", 1.0, geometric_mean(ratios(rows, COMPILED))),
        ("torch / ours, ResNet-50 training step", 1.0, geometric_mean(_network(rows, "ms_launched"))),
        ("torch / ours, its peak memory", 1.0, geometric_mean(_network(rows, "peak_bytes"))),
    ]


def summary(rows: list[Row]) -> str:
    """Return a short table: our share of the floor, and each peer's time over ours (geometric mean and least)."""
    lines = [f"{'task':12} {'layout':14} {'dtype':9} {'of floor':>8}  peer's time / ours: mean (least)"]
    for task, layout, dtype in sorted({(r["task"], r["layout"], r["dtype"]) for r in _layers(rows)}):
        group = [r for r in _layers(rows) if (r["task"], r["layout"], r["dtype"]) == (task, layout, dtype)]
        found = {name: ratios(group, name) for name in CONTENDERS if name != OURS}
        peers = (f"{name} {geometric_mean(r):.2f} ({min(r):.2f})" for name, r in found.items() if r)
        large = _shares(group)
        share = f"{100 * geometric_mean(large):.0f} %" if large else "-"
        lines.append(f"{task:12} {layout:14} {dtype:9} {share:>8}  {'; '.join(peers)}")
    lines.append("")
    for what, least, measured in targets(rows):
        verdict = "not measured" if measured != measured else "met" if measured >= least else "missed"
        lines.append(f"{what:56} {measured:5.2f}  target {least:.2f}  {verdict}")
    return "\n".join(lines)
