"""Read the layers of a Keras model for the doctor."""

from __future__ import annotations

from typing import Any

from batchnorm.doctor.measure.layers import Layer, Statistics, Vectors
from batchnorm.keras.models.layers import Found, array, channels_of
from batchnorm.keras.models.observe import statistics_of


def layers_of(model: Any, found: list[Found]) -> tuple[Layer, ...]:
    """Return the model's layers with their role in training."""
    trained = {id(variable) for variable in model.trainable_variables}
    return tuple(_layer(each, trained) for each in found)


def _layer(found: Found, trained: set[int]) -> Layer:
    layer = found.module
    gamma, beta = (None if variable is None else array(variable) for variable in (layer.gamma, layer.beta))
    affine = [variable for variable in (layer.gamma, layer.beta) if variable is not None]
    mean, var = statistics_of(layer)
    # A layer that is frozen normalizes by its moving statistics, and does not update them.
    trains, channels = bool(layer.trainable), channels_of(layer)
    return Layer(
        found.paths,
        type(layer).__name__,
        channels,
        eps=float(layer.epsilon),
        momentum=1.0 - layer.momentum,
        running=Statistics(mean[None], var[None]),
        updates_running=trains,
        by_batch=trains,
        vectors=Vectors(gamma, beta, mean, var),
        weight_of_old=layer.momentum,
        training=trains,
        affine=bool(affine),
        trained=any(id(variable) in trained for variable in affine),
        parameters=channels * len(affine),
        buffers=2 * channels,
    )


def device_of(model: Any) -> str:
    """Return the device of the model's variables, such as `cpu:0`; all of them if there are several."""
    return ", ".join(sorted({_device(variable.value) for variable in model.variables}))


def _device(value: Any) -> str:
    device: Any = getattr(value, "device", "cpu")  # arrays of NumPy 1 have none
    if hasattr(device, "platform"):  # of JAX
        return f"{device.platform}:{device.id}"
    return str(device).rpartition("device:")[2].lower()  # TensorFlow has /job:localhost/replica:0/task:0/device:CPU:0


def dtype_of(model: Any) -> str:
    """Return the floating-point dtype of the model's variables; all of them if there are several."""
    return ", ".join(sorted({variable.dtype for variable in model.variables if "float" in variable.dtype}))
