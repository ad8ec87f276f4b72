"""Pictures: an overview; bars for each case; time against tensor size and against threads. Most show the floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from benchmarks.measuring.records import Row, select
from benchmarks.reports import targets
from benchmarks.subjects import cases
from benchmarks.subjects.cases import STEP
from benchmarks.subjects.peers import COMPILED, JAX, ONNXRUNTIME, OURS, TORCH, TORCH_INPLACE

COLORS = {
    OURS: "#3949ab",
    TORCH: "#e06c2f",
    TORCH_INPLACE: "#f0a878",
    COMPILED: "#9c5f3a",
    JAX: "#4f9d69",
    ONNXRUNTIME: "#8a8a8a",
}
FLOOR = "#111111"


def _bars(rows: list[Row], title: str, path: Path) -> None:
    """Draw one panel per shape: each contender's median as a bar, p20 to p80 as a line, the floor dashed."""
    panels = targets.by_cell(rows)
    names = [n for n in COLORS if any(n in contenders for contenders in panels.values())]
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    height = 0.26 * len(names) + 0.75
    figure, axes = plt.subplots(lines, columns, figsize=(11, lines * height + 0.8), squeeze=False, layout="constrained")
    for axis, (cell, contenders) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            if name not in contenders:
                axis.text(0, i, " none", va="center", fontsize=7, color="#999999")
                continue
            low, middle, high = (float(contenders[name][f"p{p}_ms"]) for p in (20, 50, 80))
            axis.barh(i, middle, color=COLORS[name], height=0.75)
            axis.plot([low, high], [i, i], color="#00000088", linewidth=1)
            axis.text(max(middle, high), i, f" {middle:.3g}", va="center", fontsize=7)
        axis.axvline(float(contenders[OURS]["floor_ms"]), color=FLOOR, linestyle="--", linewidth=1)
        axis.set_title(cell[0], fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}\nmilliseconds, median with p20 to p80; dashed: the memory's floor", fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _size_text(nbytes: float, _: int = 0) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _sizes(rows: list[Row], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for allocator, style in (("kept", "-"), ("default", ":")):
        for name in (OURS, TORCH):
            chosen = sorted(select(rows, allocator=allocator, contender=name), key=lambda r: int(r["bytes"]))
            if not chosen:
                continue
            label = f"{name}, {'memory kept' if allocator == 'kept' else 'default allocator'}"
            nbytes = [int(r["bytes"]) for r in chosen]
            axis.plot(nbytes, [float(r["p50_ms"]) for r in chosen], style, color=COLORS[name], marker=".", label=label)
            if allocator == "kept":
                low, high = ([float(r[f"p{p}_ms"]) for r in chosen] for p in (20, 80))
                axis.fill_between(nbytes, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
                if name == OURS:
                    floor = [float(r["floor_ms"]) for r in chosen]
                    axis.plot(nbytes, floor, "--", color=FLOOR, linewidth=1, label="floor")
    axis.set(xscale="log", yscale="log", xlabel="size of x", ylabel="milliseconds")
    axis.set_title(f"{STEP}, float32, contiguous, [8, 32, S, 1]", fontsize=10)
    cache = int(rows[0]["cache_bytes"])
    axis.axvline(cache, color="#999999", linewidth=0.8)
    axis.text(
        cache, axis.get_ylim()[0] * 1.3, " last-level cache", fontsize=7, color="#666666", rotation=90, va="bottom"
    )
    axis.xaxis.set_major_formatter(FuncFormatter(_size_text))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _threads(rows: list[Row], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    ours = sorted(select(rows, contender=OURS), key=lambda r: int(r["threads"]))
    for name in (OURS, TORCH):
        chosen = sorted(select(rows, contender=name), key=lambda r: int(r["threads"]))
        counts = [int(r["threads"]) for r in chosen]
        low, middle, high = ([float(r[f"p{p}_ms"]) for r in chosen] for p in (20, 50, 80))
        axis.plot(counts, middle, color=COLORS[name], marker="o", label=name)
        axis.fill_between(counts, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    counts = [int(r["threads"]) for r in ours]
    axis.plot(counts, [float(r["floor_ms"]) for r in ours], "--", color=FLOOR, linewidth=1, label="floor")
    cores = int(rows[0]["cores"])
    axis.axvline(cores, color="#999999", linewidth=0.8)
    axis.text(
        cores, 0.98, f" {cores} cores", fontsize=7, color="#666666", va="top", transform=axis.get_xaxis_transform()
    )
    axis.set(xlabel="threads", ylabel="milliseconds", xticks=counts)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_title(f"{STEP}, float32, {rows[0]['shape']}, memory kept", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _overview(layers: list[Row], exactness: list[Row], path: Path) -> None:
    """Draw the error against the mean, and the time of a training step for each shape, ours and torch's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
    for name in (OURS, TORCH):
        rows = list(select(exactness, contender=name, dtype="float32"))
        offsets = sorted({float(r["offset"]) for r in rows})
        worst = [max(float(r["error_y"]) for r in rows if float(r["offset"]) == offset) for offset in offsets]
        left.plot(range(len(offsets)), worst, "o-", color=COLORS[name], label=name)
    left.set(yscale="log", xticks=range(len(offsets)), xticklabels=[f"{offset:,.0f} σ" for offset in offsets])
    left.set(xlabel="distance of the mean from zero", ylabel="largest relative error")
    left.axhline(1, color=FLOOR, linestyle=":", linewidth=1)
    left.text(0, 1, "no correct digit", va="bottom", fontsize=8)
    left.set_title("Exactness: float32 against float64", fontsize=10)
    panels = targets.by_cell(layers)
    for i, contenders in enumerate(panels.values()):
        for name, shift in ((OURS, -0.2), (TORCH, 0.2)):
            milliseconds = float(contenders[name]["p50_ms"])
            right.barh(i + shift, milliseconds, 0.38, color=COLORS[name], label=name if i == 0 else None)
            right.text(milliseconds, i + shift, f" {milliseconds:.3g}", va="center", fontsize=8)
    right.set_yticks(range(len(panels)), [cell[0] for cell in panels], fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="milliseconds")
    right.set_title(f"Speed: training step of BN + ReLU, float32, {layers[0]['threads']} threads", fontsize=10)
    for axis, place in ((left, "center right"), (right, "lower right")):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False, loc=place)
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw(tables: dict[str, list[Row]], out: Path) -> None:
    """Draw the pictures that have results."""
    if layers := tables.get("layers"):
        kept = list(select(layers, allocator="kept", dtype="float32"))
        for layout in cases.LAYOUTS:
            chosen = list(select(kept, layout=layout, task=STEP))
            if chosen:
                _bars(chosen, f"{STEP}, float32, {layout}, memory kept", out / f"performance-{layout}.png")
        chosen = list(select(kept, layout="contiguous", task="BN+ReLU inference"))
        if chosen:
            _bars(chosen, "BN+ReLU inference, float32, contiguous, memory kept", out / "performance-inference.png")
        large = [r for r in select(kept, layout="contiguous", task=STEP) if int(r["bytes"]) > int(r["cache_bytes"])]
        if large and (exactness := tables.get("exactness")):
            _overview(large, exactness, out / "overview.png")
    if sizes := tables.get("sizes"):
        _sizes(sizes, out / "performance-sizes.png")
    if threads := tables.get("threads"):
        _threads(threads, out / "performance-threads.png")
