"""Our operators on data in a core's own cache: the time that instructions take, without memory.

One thread computes two sizes of the same kind: `WHOLE` has four times the channels of `QUARTER`, or four times the rows
where the values of a channel are spread. Their difference is the time for so many values, without a call's fixed cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

import batchnorm.ops  # noqa: F401  # registers the operators
from benchmarks.subjects.cases import DTYPES, EPS, Case, make_data
from benchmarks.subjects.peers import Passes

QUARTER, WHOLE = "in the cache, quarter", "in the cache"
REPEATS = 40  # calls in one timed pass
_BYTES = 160 << 10  # of x; backward reads and writes three times as much
_SPREAD = 512  # channels at most, so that there are rows enough
_SHORT, _TOGETHER = 128, 32  # so many channels with shorter rows are whole cache lines, which kernels process together


def in_cache(case: Case) -> dict[str, Case]:
    """Return the cases of both sizes, with the row length, the layout and the dtype of `case`."""
    n, c, *spatial = case.shape
    values = _BYTES // DTYPES[case.dtype].itemsize
    if case.spreads:
        c = min(c, _SPREAD)
        rows = values // (4 * c)
        sizes = [(k * rows, c) for k in (1, 4)]
        if spatial:
            sizes = [(1, c, r, *[1] * (len(spatial) - 1)) for r, _ in sizes]
    else:
        row = min(math.prod(spatial), values // 4)  # a longer row has the same loop
        unit = _TOGETHER if row < _SHORT else 1
        n = min(n, values // (4 * row * unit))
        channels = values // (4 * row * unit * n) * unit
        sizes = [(n, k * channels, row, *[1] * (len(spatial) - 1)) for k in (1, 4)]
    return {name: replace(case, shape=shape) for name, shape in zip((QUARTER, WHOLE), sizes, strict=True)}


def repeated_passes(case: Case) -> Passes:
    """Return the passes of BN + ReLU by our operators on one thread, each `REPEATS` times on the same data."""
    data, ops = make_data(case), torch.ops.batchnorm
    x, weight, bias = data.x.detach(), data.weight, data.bias
    attributes = (EPS, "relu", 0.0)
    threads = torch.get_num_threads()

    def forward() -> Any:
        torch.set_num_threads(1)
        for _ in range(REPEATS):
            statistics = ops.train_forward(x, weight, bias, None, *attributes)[1:]
        torch.set_num_threads(threads)
        return statistics

    def backward(statistics: Any) -> None:
        torch.set_num_threads(1)
        for _ in range(REPEATS):
            ops.train_backward(data.dy, x, None, None, *statistics, weight, bias, *attributes, False)
        torch.set_num_threads(threads)

    return Passes(forward, backward)
