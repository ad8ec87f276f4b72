"""The tables of the documentation about the kernels' code and their expected time."""

from __future__ import annotations

from pathlib import Path

from batchnorm.files import write_whole
from benchmarks.gpu.layers import BATCHES, LAYERS, Case
from benchmarks.gpu.model.devices import DEVICES
from benchmarks.gpu.model.expected import expected
from benchmarks.gpu.static import table
from benchmarks.measuring.records import Row
from benchmarks.reports.markdown import markdown
from benchmarks.subjects import cases

EXPECTED = "gpu_expected.csv"
_CASE = ("shape", "layout", "dtype")


def expected_rows() -> list[Row]:
    """Return the expected time of a training step of BN + ReLU at ResNet-50's shapes, on each device."""
    shapes = [(n, c, s, s) for n in BATCHES for c, s in LAYERS]
    wanted = [
        Case(shape, layout, dtype, False) for shape in shapes for layout in cases.LAYOUTS for dtype in cases.DTYPES
    ]
    found = []
    for device in DEVICES:
        for case in wanted:
            e = expected(case, device)
            found.append({
                "device": device.name,
                "shape": cases.shape_text(case.shape),
                "layout": case.layout,
                "dtype": case.dtype,
                "task": case.task,
                "launches": e.launches,
                "bytes": round(e.bytes),
                "instructions": round(e.instructions),
                "floor_us": round(e.floor * 1e6, 1),
                "expected_us": round(e.seconds * 1e6, 1),
                "torch_us": round(e.torch * 1e6, 1),
                "limit": e.limit,
            })  # fmt: skip
    return found


def expected_markdown(rows: list[Row]) -> str:
    """Return one row per case, with three columns for each device."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in _CASE), {})[row["device"]] = row
    head = [*_CASE, "launches", *(f"{device.name}: floor / expected / torch, µs" for device in DEVICES), "H200's limit"]
    body = []
    for case, by_device in cells.items():
        times = [
            " / ".join(f"{by_device[d.name][k]:.0f}" for k in ("floor_us", "expected_us", "torch_us")) for d in DEVICES
        ]
        first = by_device[DEVICES[0].name]
        body.append([*case, str(first["launches"]), *times, first["limit"]])
    return markdown(head, body, numbers_from=3)


def static_markdown(rows: list[Row]) -> str:
    """Return the instructions a value and the registers of each kernel, by layout and dtype."""
    columns = [(layout, dtype) for layout in cases.LAYOUTS for dtype in cases.DTYPES]
    cells: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["kernel"]), {})[row["layout"], row["dtype"]] = row
    body = [
        [shape, f"`{kernel}`", *(_cell(by_column.get(column)) for column in columns)]
        for (shape, kernel), by_column in cells.items()
    ]
    return markdown(["shape", "kernel", *(f"{layout} {dtype}" for layout, dtype in columns)], body, numbers_from=2)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row['instructions_a_value']:.1f} ({row['registers']})"


def write(out: Path, static: list[Row]) -> None:
    """Write the tables, from the rows of the kernels' code on the first device."""
    rows = expected_rows()
    table.write(out / EXPECTED, rows)
    write_whole(out / "gpu_expected.md", expected_markdown(rows))
    write_whole(out / "gpu_static.md", static_markdown(static))
