"""y and its gradients on the current backend, as NumPy arrays."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
HAS_GRADIENTS = BACKEND != "numpy"
# How a training step runs. Keras's own tests and a training with run_eagerly cover the eager mode of TensorFlow.
MODES = {"torch": ("eager",), "jax": ("jit",), "tensorflow": ("graph", "xla"), "numpy": ("eager",)}[BACKEND]


def as_arrays(*tensors: Any) -> list[np.ndarray]:
    return [ops.convert_to_numpy(t) for t in tensors]


def forward_and_gradients(layer: Any, x: Any, dy: Any, mask: Any, mode: str) -> list[np.ndarray]:
    """Return y, and (if the backend has gradients) those of x and of the trainable weights; update the layer."""
    dtype = layer.compute_dtype
    x, dy = ops.convert_to_tensor(x, dtype), ops.convert_to_tensor(dy, dtype)
    mask = None if mask is None else ops.convert_to_tensor(mask)
    if not layer.built:
        layer.build(x.shape)
    if BACKEND == "numpy":
        return as_arrays(layer(x, training=True, mask=mask))
    return {"torch": _on_torch, "jax": _on_jax, "tensorflow": _on_tensorflow}[BACKEND](layer, x, dy, mask, mode)


def _on_torch(layer: Any, x: Any, dy: Any, mask: Any, mode: str) -> list[np.ndarray]:
    import torch

    x.requires_grad_()
    y = layer(x, training=True, mask=mask)
    return as_arrays(y.detach(), *torch.autograd.grad(y, [x, *(v.value for v in layer.trainable_variables)], dy))


def _on_jax(layer: Any, x: Any, dy: Any, mask: Any, mode: str) -> list[np.ndarray]:
    import jax

    def forward(x: Any, trainable: Any) -> Any:
        fixed = [v.value for v in layer.non_trainable_variables]
        return layer.stateless_call(trainable, fixed, x, training=True, mask=mask)

    @jax.jit
    def step(x: Any, trainable: Any) -> Any:
        y, pull, updated = jax.vjp(forward, x, trainable, has_aux=True)
        return y, pull(dy), updated

    y, (dx, gradients), updated = step(x, [v.value for v in layer.trainable_variables])
    for variable, value in zip(layer.non_trainable_variables, updated, strict=True):
        variable.assign(value)
    return as_arrays(y, dx, *gradients)


def _on_tensorflow(layer: Any, x: Any, dy: Any, mask: Any, mode: str) -> list[np.ndarray]:
    import tensorflow as tf

    def step(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
        return y, *tape.gradient(y, [x, *layer.trainable_variables], dy)

    # Sizes are unknown in the graph, as in a model without a batch size.
    unknown = tf.TensorSpec([None] * (len(x.shape) - 1) + [x.shape[-1]], x.dtype)
    if layer.axis != -1:
        unknown = tf.TensorSpec([None, *x.shape[1:]], x.dtype)
    compiled = tf.function(step, jit_compile=mode == "xla", input_signature=[unknown, unknown])
    return as_arrays(*compiled(x, dy))
