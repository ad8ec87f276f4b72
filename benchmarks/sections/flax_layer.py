"""A training step of the layer for Flax, and of Flax's own with ReLU, under `jit`: CPU time and elapsed time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import shortest
from benchmarks.subjects.peers import OURS, installed

FLAX = "Flax"
KEY = ("shape", "axis", "contender")

Step = Callable[[], Any]

_SMALL = (((4, 8, 6, 6), 1), ((4, 6, 6, 8), -1))
_LARGE = (((32, 64, 56, 56), 1), ((32, 56, 56, 64), -1))


def measure_flax(options: Options, table: Table) -> None:
    """Write the shortest CPU time and the shortest elapsed time of a step that computes y and every gradient."""
    if not installed("jax", "flax"):
        print("flax: skipped, because Flax is not installed")
        return
    done = table.measured()
    for shape, axis in _SMALL if options.quick else _LARGE:
        where = "×".join(map(str, shape)), str(axis)
        if (*where, OURS) in done:
            continue
        steps = _steps(shape, axis)
        times = shortest(steps, options.seconds)
        table.append([{**dict(zip(KEY, (*where, name), strict=True)), **times[name]} for name in steps])
    print("flax measured", flush=True)


def _steps(shape: tuple[int, ...], axis: int) -> dict[str, Step]:
    import jax
    from flax import linen

    import batchnorm.jax.linen

    x, dy = (jax.numpy.asarray(a) for a in np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32))

    def step_of(layer: linen.Module, activation: Callable[[Any], Any]) -> Step:
        variables = layer.init(jax.random.key(0), x)

        @jax.jit
        def step(x: Any, dy: Any, variables: Any) -> Any:
            def forward(x: Any, params: Any) -> Any:
                y, updated = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
                return activation(y), updated

            y, pull, updated = jax.vjp(forward, x, variables["params"], has_aux=True)
            return y, updated, pull(dy)

        return lambda: jax.block_until_ready(step(x, dy, variables))

    ours = batchnorm.jax.linen.BatchNorm(use_running_average=False, axis=axis, activation="relu")
    stock = linen.BatchNorm(use_running_average=False, axis=axis)
    return {OURS: step_of(ours, lambda y: y), FLAX: step_of(stock, jax.nn.relu)}


def ratio(rows: list[Row], kind: str) -> float:
    """Return the time of Flax's layer divided by ours, from the rows of one shape."""
    times = {row["contender"]: float(row[kind]) for row in rows}
    return times[FLAX] / times[OURS]
