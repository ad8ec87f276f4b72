"""Errors of our results and torch's against float64, with means up to 10⁶ deviations from zero."""

from __future__ import annotations

from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Table
from benchmarks.subjects.cases import LARGE, SMALL, Case, errors, layouts_of, make_data, shape_text
from benchmarks.subjects.peers import CONTENDERS, OURS, TORCH

KEY = ("shape", "layout", "dtype", "offset", "contender")
TASK = "BN forward+backward"
OFFSETS = {"float32": (0, 1e4, 1e6), "bfloat16": (0,)}  # bfloat16 cannot resolve deviations at 10⁴


def measure_exactness(options: Options, table: Table) -> None:
    """Write the largest errors of y and dx, in units of the largest |y| and |dx|."""
    done = table.measured()
    for shape in SMALL if options.quick else LARGE + SMALL:
        for dtype, offsets in OFFSETS.items():
            for offset in offsets:
                for layout in layouts_of(shape):
                    case = Case(shape, layout, dtype, TASK)
                    where = (shape_text(shape), layout, dtype, f"{offset:g}")
                    data = None
                    for contender in CONTENDERS:
                        if contender.name not in (OURS, TORCH) or (*where, contender.name) in done:
                            continue
                        data = data or make_data(case, offset)
                        call = contender.build(case, data)
                        assert call is not None
                        found = errors(case, data, contender.as_torch(case, call()))
                        row = dict(zip(KEY, (*where, contender.name), strict=True))
                        table.append([{**row, **{f"error_{name}": found[name] for name in ("y", "dx")}}])
    print("exactness measured", flush=True)
