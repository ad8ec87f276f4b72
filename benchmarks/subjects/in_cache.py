"""Our operators on data in the cores' own caches: the time that instructions take, without memory.

Two sizes of the same kind are timed: `WHOLE` has twice the channels of `HALF`, or twice the rows where the values of a
channel are spread. Their difference is the time for so many values, without a call's fixed cost.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

import batchnorm.ops  # noqa: F401  # registers the operators
from benchmarks.subjects.cases import DTYPES, EPS, Case, make_data
from benchmarks.subjects.peers import Passes

HALF, WHOLE = "in the cache, half", "in the cache"
REPEATS = 40  # calls in one timed pass
_CORE_BYTES = 128 << 10  # of x, for each core; backward reads and writes three times as much
_CHANNELS = 512  # at most, so that each core gets rows of all of them


def in_cache(case: Case, threads: int) -> dict[str, Case]:
    """Return the cases of both sizes, with the row length, the layout and the dtype of `case`."""
    n, c, *spatial = case.shape
    values = _CORE_BYTES // DTYPES[case.dtype].itemsize
    if case.spreads:
        c = min(c, _CHANNELS)
        rows = threads * max(values // c, 2)
        shapes = {HALF: (rows // 2, c), WHOLE: (rows, c)}
        if spatial:
            shapes = {name: (1, c, r, *[1] * (len(spatial) - 1)) for name, (r, _) in shapes.items()}
    else:
        row = min(math.prod(spatial), values // 2)  # a longer row has the same loop
        n = min(n, values // (2 * row))
        each = values // (2 * n * row)
        tail = [row, *[1] * (len(spatial) - 1)]
        shapes = {name: (n, k * threads * each, *tail) for k, name in enumerate((HALF, WHOLE), 1)}
    return {name: replace(case, shape=shape) for name, shape in shapes.items()}


def repeated_passes(case: Case) -> Passes:
    """Return the passes of BN + ReLU by our operators, each `REPEATS` times on the same data."""
    data, ops = make_data(case), torch.ops.batchnorm
    x, weight, bias = data.x.detach(), data.weight, data.bias
    attributes = (EPS, "relu", 0.0)

    def forward() -> Any:
        for _ in range(REPEATS):
            statistics = ops.train_forward(x, weight, bias, None, *attributes)[1:]
        return statistics

    def backward(statistics: Any) -> None:
        for _ in range(REPEATS):
            ops.train_backward(data.dy, x, None, None, *statistics, weight, bias, *attributes, False)

    return Passes(forward, backward)
