"""A training step of the layer for Keras and of Keras's own with ReLU: CPU time, and errors against float64.

Keras has one backend in a process, so that each backend is a setting with a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from batchnorm import reference
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import shortest
from benchmarks.subjects.peers import OURS, installed

KERAS = "Keras"
KEY = ("backend", "mode", "shape", "axis", "contender")
MODES = {"torch": ("eager",), "jax": ("jit",), "tensorflow": ("graph", "XLA")}
MEANS = (0.0, 1e4, 1e6)

Step = Callable[[Any, Any], Any]

_SMALL = (((4, 6, 6, 8), -1), ((4, 8, 6, 6), 1))
_LARGE = (((32, 56, 56, 64), -1), ((32, 64, 56, 56), 1))


def measure_keras(options: Options, table: Table) -> None:
    """Write the shortest CPU time of a step, and the errors of y and dx relative to the largest |y| and |dx|."""
    if not installed("keras"):
        print("keras: skipped, because Keras is not installed")
        return
    os.environ.setdefault("KERAS_BACKEND", "torch")  # in a quick run, which has one process for all settings
    import keras

    backend = keras.backend.backend()
    done = table.measured()
    for shape, axis in _SMALL if options.quick else _LARGE:
        for mode in MODES[backend]:
            where = (backend, mode, "×".join(map(str, shape)), str(axis))
            if (*where, OURS) in done:
                continue
            noise, dy = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
            convert = keras.ops.convert_to_tensor
            steps = {name: _step_of(layer, mode) for name, layer in _layers(axis, shape).items()}
            errors = {name: _errors(step, noise, dy, axis) for name, step in steps.items()}
            tensors = convert(noise), convert(dy)
            times = shortest({name: partial(step, *tensors) for name, step in steps.items()}, options.seconds)
            rows: list[Row] = [
                {
                    **dict(zip(KEY, (*where, name), strict=True)),
                    "keras": keras.__version__,
                    "cpu_ms": times[name]["cpu_ms"],
                    **errors[name],
                }
                for name in steps
            ]
            table.append(rows)
    print(f"keras measured on {backend}", flush=True)


def _layers(axis: int, shape: tuple[int, ...]) -> dict[str, Callable[[Any], Any]]:
    import keras

    from batchnorm.keras import BatchNormalization

    ours = BatchNormalization(axis=axis, activation="relu")
    theirs = keras.Sequential([keras.layers.BatchNormalization(axis=axis), keras.layers.ReLU()])
    for layer in (ours, theirs):
        layer.build(shape)
    return {OURS: ours, KERAS: theirs}


def _step_of(layer: Any, mode: str) -> Step:
    """Return a function of x and dy that returns y and the gradients of x and the weights."""
    return {"eager": _torch_step, "jit": _jax_step}.get(mode, _tensorflow_step)(layer, mode)


def _torch_step(layer: Any, _: str) -> Step:
    import torch

    weights = [v.value for v in layer.trainable_variables]

    def step(x: Any, dy: Any) -> Any:
        x = x.detach().requires_grad_()
        y = layer(x, training=True)
        return y.detach(), *torch.autograd.grad(y, [x, *weights], dy)

    return step


def _jax_step(layer: Any, _: str) -> Step:
    import jax

    trainable, fixed = (
        [v.value for v in group] for group in (layer.trainable_variables, layer.non_trainable_variables)
    )

    @jax.jit
    def compute(x: Any, dy: Any, trainable: Any, fixed: Any) -> Any:
        call = lambda x, w: layer.stateless_call(w, fixed, x, training=True)  # noqa: E731
        y, pull, updated = jax.vjp(call, x, trainable, has_aux=True)
        return y, *pull(dy), updated

    return lambda x, dy: jax.block_until_ready(compute(x, dy, trainable, fixed))


def _tensorflow_step(layer: Any, mode: str) -> Step:
    import tensorflow as tf

    @tf.function(jit_compile=mode == "XLA")
    def compute(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, *tape.gradient(y, [x, *layer.trainable_variables], dy)

    return compute


def ratio(rows: list[Row]) -> float:
    """Return the time of Keras's layer divided by ours, from the rows of one point."""
    times = {row["contender"]: float(row["cpu_ms"]) for row in rows}
    return times[KERAS] / times[OURS]


def _errors(step: Step, noise: Any, dy: Any, axis: int) -> dict[str, float]:
    import keras

    found = {}
    for mean in MEANS:
        x = (noise + np.float32(mean)).astype(np.float32)
        forward = reference.forward_training(x, axis=axis, eps=1e-3, activation="relu")
        gradients = reference.backward(dy, forward)
        y, dx = map(keras.ops.convert_to_numpy, step(*map(keras.ops.convert_to_tensor, (x, dy)))[:2])
        # At a kink, rounding decides the gradient of a single value.
        agrees = (y > 0) == (forward.y > 0)
        found[f"error_y_{mean:g}"] = float(np.abs(y - forward.y).max() / forward.y.max())
        found[f"error_dx_{mean:g}"] = float(np.abs((dx - gradients.dx) * agrees).max() / np.abs(gradients.dx).max())
    return found
