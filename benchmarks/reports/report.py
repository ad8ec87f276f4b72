"""Tables and pictures from the CSV files: printed, and written for the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from batchnorm.files import write_whole
from benchmarks.measuring import records
from benchmarks.measuring.records import Row, select
from benchmarks.reports import limits_report, pictures, steps_report, targets
from benchmarks.reports.markdown import markdown
from benchmarks.reports.markdown import milliseconds as _ms
from benchmarks.sections import flax_layer, frameworks, keras_layer, small
from benchmarks.subjects.cases import DTYPES, LAYOUTS, STEP, TASKS
from benchmarks.subjects.peers import COMPILED, EAGER, JAX, ONNXRUNTIME, OURS, TORCH, TORCH_INPLACE

SHOWN = (OURS, TORCH, TORCH_INPLACE, COMPILED, JAX, ONNXRUNTIME, EAGER)
FILES = (
    "layers", "limits", "sizes", "threads", "small", "small-python", "exactness", "memory", "page-faults", "family",
    "networks", "fold", "fold-photographs", "fold-speed", "frameworks", "keras", "flax",
)  # fmt: skip


RESULTS = Path(__file__).resolve().parents[1] / "results"
README = RESULTS.parent.parent / "README.md"
QUOTED = ("summary", "networks-summary")


def machine(rows: list[Row]) -> str:
    """Return a description of where and when the rows were measured."""
    r = rows[0]
    days = sorted({row["time"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    peers = ", ".join(f"{n} {r[n]}" for n in ("torch", "jax", "onnxruntime") if r[n] != "absent")
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    others = np.median([float(row["others"]) for row in rows])
    return (
        f"Measured {when} on {r['processor']}, {r['cores']} cores, {int(r['cache_bytes']) >> 20} MB of last-level "
        f"cache; batchnorm {r['implementation']}; Python {r['python']}, {peers}; commit {commits}. "
        f"Meanwhile other processes used {others:.0%} of the machine (median).\n"
    )


def _cases_table(rows: list[Row], dtype: str, layout: str, task: str) -> str:
    """Return one row per shape: medians in ms, the ratio to the faster torch, and the floor."""
    cells = targets.by_cell(list(select(rows, dtype=dtype, layout=layout, task=task)))
    names = [n for n in SHOWN if any(n in c for c in cells.values())]
    twice = layout == "channels-last" and TASKS[task].training
    head = ["shape", *[f"{n}, ms" for n in names], "torch / ours", "floor, ms", "share of floor"]
    head += ["floor reading x twice, ms"] if twice else []
    body = []
    for (shape, *_), contenders in cells.items():
        ours = contenders.get(OURS)
        if ours is None:
            continue
        theirs = [float(contenders[n]["p50_ms"]) for n in (TORCH, TORCH_INPLACE) if n in contenders]
        ratio = f"{min(theirs) / float(ours['p50_ms']):.2f}×" if theirs else ""
        row = [shape, *[_ms(contenders[n]["p50_ms"]) if n in contenders else "" for n in names], ratio]
        row += [_ms(ours["floor_ms"]), f"{float(ours['share_of_floor']):.0%}"]
        body.append([*row, *([_ms(ours["floor_read_twice_ms"])] if twice else [])])
    return markdown(head, body)


def layers_markdown(rows: list[Row], allocator: str, tasks: Iterable[str]) -> str:
    """Return a table for each task, dtype and layout, under headings."""
    rows = list(select(rows, allocator=allocator))
    return "".join(
        f"\n**{task}, {dtype}, {layout}**\n\n{_cases_table(rows, dtype, layout, task)}"
        for task in tasks
        for dtype in DTYPES
        for layout in LAYOUTS
        if any(select(rows, task=task, dtype=dtype, layout=layout))
    )


def verdicts_of(tables: dict[str, list[Row]]) -> list[targets.Verdict]:
    """Return every target with results, the allocator settings of one target together."""
    found = []
    for allocator in records.ALLOCATORS:
        if tables.get("layers"):
            found += targets.layer_verdicts(tables["layers"], allocator)
        if tables.get("networks"):
            found += targets.network_verdicts(tables["networks"], allocator)
    if tables.get("limits"):
        found += targets.limit_verdicts(tables["limits"])
    if tables.get("exactness"):
        found += targets.exactness_verdicts(tables["exactness"])
    if tables.get("memory"):
        found += targets.memory_verdicts(tables["memory"])
    order = {what: i for i, what in enumerate(dict.fromkeys(v.what for v in found))}
    return sorted(found, key=lambda v: order[v.what])


_MET = {True: "met", False: "**not met**", None: "not judged"}


def targets_markdown(tables: dict[str, list[Row]]) -> str:
    head = ("what", "target", "allocator", "measured", "")
    body = [(v.what, v.target, v.allocator, v.measured, _MET[v.met]) for v in verdicts_of(tables)]
    return markdown(head, body, 9)


def summary_markdown(rows: list[Row]) -> str:
    """Return the summary: geometric means of the speed-up over torch on large tensors."""
    body = []
    for dtype in DTYPES:
        for layout in LAYOUTS:
            chosen = [r for r in select(rows, dtype=dtype, layout=layout, task=STEP) if r["shape"] in targets.LARGE]
            cells = [dtype, layout]
            for allocator in records.ALLOCATORS:
                found = targets.ratios(list(select(chosen, allocator=allocator)), TORCH, TORCH_INPLACE)
                if found:
                    values = [r.value for r in found]
                    cells.append(f"{targets.geometric_mean(values):.1f}× ({min(values):.1f} to {max(values):.1f})")
            body.append(cells)
    settings = [f"{a} allocator" if a == "default" else "memory kept" for a in records.ALLOCATORS]
    return markdown(("dtype", "layout", *settings), [b for b in body if len(b) == 4], 2)


def exactness_markdown(rows: list[Row]) -> str:
    """Return the largest error over all shapes for each dtype, layout and offset."""
    worst: dict[tuple[str, ...], dict[str, float]] = {}
    for r in rows:
        errors = worst.setdefault((r["dtype"], r["layout"], r["offset"]), {})
        for name in ("y", "dx"):
            key = f"{r['contender']} {name}"
            errors[key] = max(errors.get(key, 0.0), float(r[f"error_{name}"]))
    columns = [f"{c} {n}" for n in ("y", "dx") for c in (OURS, TORCH)]
    body = [
        [dtype, layout, f"{float(offset):g} σ", *[f"{errors[c]:.1e}" for c in columns]]
        for (dtype, layout, offset), errors in sorted(worst.items(), key=lambda i: (*i[0][:2], float(i[0][2])))
    ]
    return markdown(("dtype", "layout", "mean at", *columns), sorted(body, key=lambda b: b[0] != "float32"), 3)


def frameworks_markdown(rows: list[Row]) -> str:
    """Return the errors of the stock layer and ours for each framework and offset."""
    errors = {(r["framework"], r["offset"], r["contender"]): r for r in rows}
    places = sorted(dict.fromkeys((r["framework"], r["offset"]) for r in rows), key=lambda p: (p[0], float(p[1])))
    columns = [(n, c) for n in ("y", "dx") for c in (OURS, frameworks.STOCK)]
    body = [
        [framework, f"{float(at):g} σ", *(f"{float(errors[framework, at, c][f'error_{n}']):.1e}" for n, c in columns)]
        for framework, at in places
    ]
    return markdown(("framework", "mean at", *(f"{c} {n}" for n, c in columns)), body, 2)


def keras_markdown(rows: list[Row]) -> str:
    """Return CPU times, the speed-up, and the larger error of y and dx at the largest mean."""
    body = []
    far = f"{keras_layer.MEANS[-1]:g}"
    for where in dict.fromkeys((r["backend"], r["mode"], r["shape"], r["axis"]) for r in rows):
        own = {r["contender"]: r for r in rows if (r["backend"], r["mode"], r["shape"], r["axis"]) == where}
        both = [own[contender] for contender in (OURS, keras_layer.KERAS)]
        errors = [max(float(r[f"error_{name}_{far}"]) for name in ("y", "dx")) for r in both]
        times = [_ms(r["cpu_ms"]) for r in both]
        body.append([*where, *times, f"{keras_layer.ratio(both):.1f}×", *(f"{error:.0e}" for error in errors)])
    columns = [f"{name}{what}" for what in (" CPU, ms", " error") for name in (OURS, keras_layer.KERAS)]
    return markdown(("backend", "mode", "shape", "axis", *columns[:2], "speed-up", *columns[2:]), body, 4)


def flax_markdown(rows: list[Row]) -> str:
    """Return the times of a step by our layer and by Flax's, and the speed-ups."""
    body = []
    for shape, axis in dict.fromkeys((r["shape"], r["axis"]) for r in rows):
        own = [r for r in rows if (r["shape"], r["axis"]) == (shape, axis)]
        times = {r["contender"]: r for r in own}
        cells = []
        for kind in ("cpu_ms", "elapsed_ms"):
            cells += [_ms(times[contender][kind]) for contender in (OURS, flax_layer.FLAX)]
            cells.append(f"{flax_layer.ratio(own, kind):.1f}×")
        body.append([shape, axis, *cells])
    columns = [f"{what}{unit}" for unit in (" CPU, ms", " elapsed, ms") for what in (OURS, flax_layer.FLAX)]
    return markdown(("shape", "axis", *columns[:2], "speed-up", *columns[2:], "speed-up"), body, 2)


def memory_markdown(rows: list[Row]) -> str:
    body = [
        (r["what"], r["contender"], f"{float(r['kept_tensors']):.2f}", f"{float(r['peak_tensors']):.2f}") for r in rows
    ]
    return markdown(("what", "contender", "kept for backward", "peak of a training step"), body, 2)


def page_faults_markdown(rows: list[Row]) -> str:
    """Return time and page faults of each call under each setting."""
    whats = list(dict.fromkeys(r["what"] for r in rows))
    body = []
    for allocator in dict.fromkeys(r["allocator"] for r in rows):
        own = {r["what"]: r for r in select(rows, allocator=allocator)}
        body.append([allocator, *[f"{_ms(own[w]['p50_ms'])} ({float(own[w]['page_faults']):,.0f})" for w in whats]])
    return markdown(("allocator", *whats), body)


def threads_markdown(rows: list[Row]) -> str:
    names = (OURS, TORCH)
    counts = sorted({int(r["threads"]) for r in rows})
    body = [[str(n), *[_ms(next(select(rows, threads=n, contender=c))["p50_ms"]) for c in names]] for n in counts]
    return markdown(("threads", *[f"{n}, ms" for n in names]), body)


def small_markdown(rows: list[Row]) -> str:
    """Return torch's time → ours, and for each pass the geometric mean of the ratios and the smallest."""
    columns = [(dtype, activation) for dtype in small.DTYPES for activation in small.ACTIVATIONS]
    names = {"none": "BN", "relu": "BN + ReLU"}

    def least(row: Row, contender: str) -> float:
        return float(row[f"{contender}_least_us"])

    def cell(row: Row) -> str:
        torchs, ours = least(row, TORCH), least(row, OURS)
        return f"{torchs:.3g} → {ours:.3g} ({torchs / ours:.2f}×)"

    body = []
    for threads, what in dict.fromkeys((r["threads"], r["pass"]) for r in rows):
        own = list(select(rows, threads=threads, **{"pass": what}))
        for shape in dict.fromkeys(r["shape"] for r in own):
            found = {(r["dtype"], r["activation"]): r for r in own if r["shape"] == shape}
            cells = [cell(found[column]) if column in found else "" for column in columns]
            body.append([threads, what, shape, *cells, f"{min(least(r, small.FLOOR) for r in found.values()):.3g}"])
        ratios = np.array([least(r, TORCH) / least(r, OURS) for r in own if r["shape"] != small.NETWORK])
        mean = f"geometric mean {np.exp(np.log(ratios).mean()):.2f}×, smallest {ratios.min():.2f}×"
        body.append([threads, what, "all layers", mean, *[""] * len(columns)])
    heads = [f"{dtype} {names[activation]}, µs" for dtype, activation in columns]
    return markdown(("threads", "pass", "shape", *heads, "floor, µs"), body, 3)


def family_markdown(rows: list[Row]) -> str:
    """Return the time of each layer; with two processes, each works on half of the batch."""
    columns = list(dict.fromkeys((r["processes"], r["shape"]) for r in rows))
    times = {(r["processes"], r["shape"], r["layer"]): f"{_ms(r['p50_ms'])} ({float(r['ratio']):.2f}×)" for r in rows}
    names = list(dict.fromkeys(r["layer"] for r in rows))
    heads = [f"{shape}, ms" if n == "1" else f"two processes, {shape} each, ms" for n, shape in columns]
    return markdown(("layer", *heads), [[name, *[times.get((*c, name), "") for c in columns]] for name in names])


def fold_markdown(rows: list[Row]) -> str:
    """Return a summary and, for each network, the batch normalizations left and fused, and the errors."""
    met = sum(r["within_target"] == "True" for r in rows)
    without = sum(r["remaining"] == r["fused"] == "0" for r in rows)
    left = [r["network"] for r in rows if r["remaining"] != "0"]
    beaten = sum(r["fx_failure"] != "" or int(r["fx_remaining"]) > int(r["remaining"]) + int(r["fused"]) for r in rows)
    names = f" ({', '.join(left)})" if left else ""
    text = (
        f"{len(rows)} networks: in {met}, the error is at most 10⁻⁵ or twice the error of the unfolded network. "
        f"{without} run without any batch normalization, {len(rows) - without - len(left)} with some fused with the "
        f"next operation, {len(left)} with some left{names}. `torch.fx`'s fuse leaves more, or fails, in {beaten}.\n\n"
    )
    body = [
        [
            *(r[name] for name in ("network", "how", "batch_norms", "remaining", "fused")),
            *(f"{float(r[name]):.1e}" for name in ("error", "error_unfolded")),
            r["fx_remaining"] or f"fails ({r['fx_failure']})",
            f"{float(r['fx_error']):.1e}" if r["fx_error"] else "",
        ]
        for r in rows
    ]
    head = ("network", "read by", "batch normalizations", "left", "fused", "error", "unfolded", "`torch.fx` leaves")
    return text + markdown((*head, "its error"), body, 2)


def fold_photographs_markdown(rows: list[Row]) -> str:
    """Return the number of photographs whose five most likely classes stay the same."""
    head = ("network", "BN", "left", "least variance", "error", "unfolded", "same top 5")
    body = [
        [
            *(r[name] for name in ("network", "batch_norms", "remaining")),
            *(f"{float(r[name]):.1e}" for name in ("smallest_running_var", "error", "error_unfolded")),
            f"{r['same_top5']} of {r['photographs']}",
        ]
        for r in rows
    ]
    return markdown(head, body)


def fold_speed_markdown(rows: list[Row]) -> str:
    """Return the time of a forward pass of each contender, and its speed-up over the original network."""
    networks = list(dict.fromkeys(r["network"] for r in rows))
    times = {(r["network"], r["contender"]): float(r["p50_ms"]) for r in rows}
    first = rows[0]["contender"]

    def cell(network: str, contender: str) -> str:
        ms = times.get((network, contender))
        return "" if ms is None else f"{_ms(ms)} ({times[network, first] / ms:.2f}×)"

    contenders = dict.fromkeys(r["contender"] for r in rows)
    body = [[contender, *[cell(network, contender) for network in networks]] for contender in contenders]
    shape = "{batch}×3×{size}×{size}".format_map(rows[0])
    return markdown((shape, *[f"{network}, ms" for network in networks]), body)


def write(out: Path, pictures_to: Path) -> None:
    """Print the tables, and write them to `out` as Markdown, and the pictures as PNG."""
    tables = {name: records.read(out / f"{name}.csv") for name in FILES if (out / f"{name}.csv").exists()}
    if not tables:
        print(f"there are no measurements in {out} yet")
        return
    texts = {"machine": machine([row for rows in tables.values() for row in rows]), "targets": targets_markdown(tables)}
    if layers := tables.get("layers"):
        inference = [t for t in TASKS if not TASKS[t].training]
        texts["summary"] = summary_markdown(layers)
        for allocator in records.ALLOCATORS:
            texts[f"training-{allocator}"] = layers_markdown(layers, allocator, [t for t in TASKS if TASKS[t].training])
            texts[f"inference-{allocator}"] = layers_markdown(layers, allocator, inference)
    writers = {
        "limits": limits_report.limits_markdown,
        "exactness": exactness_markdown,
        "flax": flax_markdown,
        "keras": keras_markdown,
        "frameworks": frameworks_markdown,
        "memory": memory_markdown,
        "page-faults": page_faults_markdown,
        "threads": threads_markdown,
        "small": small_markdown,
        "small-python": small_markdown,
        "fold": fold_markdown,
        "fold-photographs": fold_photographs_markdown,
        "fold-speed": fold_speed_markdown,
        "family": family_markdown,
    }
    texts |= {name: markdown_of(tables[name]) for name, markdown_of in writers.items() if tables.get(name)}
    if networks := tables.get("networks"):
        texts |= steps_report.texts(networks)
    for name, text in texts.items():
        if name in QUOTED and out == RESULTS:
            _quote_in_readme(out / f"{name}.md", text)
        write_whole(out / f"{name}.md", text)
    pictures.draw(tables, pictures_to)
    _print(tables)


def _quote_in_readme(path: Path, text: str) -> None:
    """Replace the former table by the new one in the README."""
    if path.exists() and (former := path.read_text(encoding="utf-8")):
        write_whole(README, README.read_text(encoding="utf-8").replace(former, text))


def _print(tables: dict[str, list[Row]]) -> None:
    console = Console(width=None if Console().is_terminal else 180)
    if layers := tables.get("layers"):
        for allocator in records.ALLOCATORS:
            _print_step(console, list(select(layers, allocator=allocator, task=STEP)), allocator)
    verdicts = verdicts_of(tables)
    if verdicts:
        table = RichTable("what", "target", "allocator", "measured", "", title="Targets")
        for v in verdicts:
            table.add_row(v.what, v.target, v.allocator, v.measured, _MET[v.met].strip("*"))
        console.print(table)


def _print_step(console: Console, rows: list[Row], allocator: str) -> None:
    cells = targets.by_cell(rows)
    names = [n for n in SHOWN if any(n in c for c in cells.values())]
    table = RichTable(title=f"{STEP}, median ms, allocator: {allocator}")
    for column in ("shape", "layout", "dtype"):
        table.add_column(column)
    for column in (*names, "torch / ours", "floor", "share"):
        table.add_column(column, justify="right")
    for (shape, layout, dtype, _), contenders in cells.items():
        if (ours := contenders.get(OURS)) is None:
            continue
        times = [_ms(contenders[n]["p50_ms"]) if n in contenders else "" for n in names]
        theirs = min((float(contenders[n]["p50_ms"]) for n in (TORCH, TORCH_INPLACE) if n in contenders), default=0)
        ratio = f"{theirs / float(ours['p50_ms']):.2f}×" if theirs else ""
        table.add_row(
            shape, layout, dtype, *times, ratio, _ms(ours["floor_ms"]), f"{float(ours['share_of_floor']):.0%}"
        )
    console.print(table)
