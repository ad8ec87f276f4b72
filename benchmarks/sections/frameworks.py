"""Errors of our layers and the stock ones for PyTorch, Keras and Flax, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from batchnorm import reference
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Table
from benchmarks.subjects.peers import OURS

KEY = ("framework", "offset", "contender")
STOCK = "stock layer"
BACKEND = "KERAS_BACKEND"
BACKENDS = {"torch": "torch", "jax": "jax", "tensorflow": "tensorflow"}  # and their packages
OFFSETS = (0.0, 1e2, 1e4, 1e6)
SHAPE, EPS = (32, 28, 28, 16), 1e-3

Array = NDArray[np.float32]
# Returns y and dx for x and dy, all [N, H, W, C].
Step = Callable[[Array, Array], tuple[object, object]]


def settings() -> dict[str, dict[str, str] | None]:
    """The environment of each process; None if its backend is not installed."""
    variables = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return {
        name: {BACKEND: name, **variables} if find_spec(package) and find_spec("keras") else None
        for name, package in BACKENDS.items()
    }


def measure_frameworks(options: Options, table: Table) -> None:
    """Write the largest errors of y and dx in training, in units of the largest |y| and |dx|."""
    if find_spec("keras") is None:
        print("frameworks: skipped, because Keras is not installed")
        return
    backend = os.environ.setdefault(BACKEND, "torch")
    shape = (4, 3, 3, 2) if options.quick else SHAPE
    rng = np.random.default_rng(0)
    noise, dy = rng.normal(size=shape), rng.normal(size=shape).astype(np.float32)
    done = table.measured()
    for offset in OFFSETS:
        x = (noise + offset).astype(np.float32)
        forward = reference.forward_training(x, eps=EPS, axis=-1)
        exact = forward.y, reference.backward(dy, forward).dx
        for framework, contender, step in _steps(backend, shape[-1]):
            where = (framework, f"{offset:g}", contender)
            if where in done:
                continue
            errors = {
                f"error_{name}": float(np.abs(np.asarray(got, np.float64) - of).max() / np.abs(of).max())
                for name, got, of in zip(("y", "dx"), step(x, dy), exact, strict=True)
            }
            table.append([{**dict(zip(KEY, where, strict=True)), **errors}])
    print(f"frameworks measured: {backend}", flush=True)


def _steps(backend: str, channels: int) -> Iterator[tuple[str, str, Step]]:
    """Yield framework, contender and step of everything that runs with this backend."""
    import keras

    import batchnorm
    import batchnorm.keras

    stock, ours = keras.layers.BatchNormalization, batchnorm.keras.BatchNormalization
    of_keras = {"torch": _keras_on_torch, "jax": _keras_on_jax, "tensorflow": _keras_on_tensorflow}[backend]
    for contender, layer in ((STOCK, stock), (OURS, ours)):
        yield f"Keras on {backend}", contender, of_keras(layer(epsilon=EPS))
    if backend == "torch":
        import torch

        for contender, layer in ((STOCK, torch.nn.BatchNorm2d), (OURS, batchnorm.BatchNorm2d)):
            yield "PyTorch", contender, _torch(layer(channels, eps=EPS))
    if backend == "jax" and find_spec("flax"):
        from flax import linen

        import batchnorm.jax.linen

        for contender, layer in ((STOCK, linen.BatchNorm), (OURS, batchnorm.jax.linen.BatchNorm)):
            yield "Flax", contender, _flax(layer(use_running_average=False, epsilon=EPS))


def _torch(layer) -> Step:
    import torch

    def step(x, dy):
        x, dy = (torch.from_numpy(a).movedim(-1, 1).contiguous() for a in (x, dy))
        y = layer(x.requires_grad_())
        y.backward(dy)
        return y.detach().movedim(1, -1), x.grad.movedim(1, -1)

    return step


def _keras_on_torch(layer) -> Step:
    import torch

    def step(x, dy):
        x = torch.from_numpy(x).requires_grad_()
        y = layer(x, training=True)
        y.backward(torch.from_numpy(dy))
        return y.detach(), x.grad

    return step


def _keras_on_jax(layer) -> Step:
    def forward(x):
        if not layer.built:
            layer.build(x.shape)
        trainable, others = ([v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables))
        return layer.stateless_call(trainable, others, x, training=True)[0]

    return _of_jax(forward)


def _flax(layer) -> Step:
    import jax

    def forward(x):
        variables = layer.init(jax.random.key(0), x)
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    return _of_jax(forward)


def _of_jax(forward) -> Step:
    import jax

    @jax.jit
    def step(x, dy):
        y, transpose = jax.vjp(forward, x)
        return y, transpose(dy)[0]

    return step


def _keras_on_tensorflow(layer) -> Step:
    import tensorflow as tf

    @tf.function
    def step(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, x, dy)

    return lambda x, dy: step(tf.constant(x), tf.constant(dy))
