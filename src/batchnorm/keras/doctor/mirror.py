"""Layers of Keras in the terms that the doctor's rules read: those of PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.doctor.measure.layers import Layer
from batchnorm.keras.models import layers as keras_layers
from batchnorm.keras.models.observe import statistics_of
from batchnorm.models.execution.observe import Statistics
from batchnorm.walk import Found


class Mirror(nn.Module):
    """A copy of the parameters and statistics of a Keras layer.

    Attributes:
        weight: γ, or None. It requires a gradient if the model trains it.
        bias: β, or None.
        momentum: The weight of the new batch, 1 minus Keras's momentum.
        weight_of_old: Keras's momentum.
        eps: ε.
        num_features: Number of channels.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: Any, trained: set[int]) -> None:
        super().__init__()
        self.weight, self.bias = (_parameter(variable, trained) for variable in (layer.gamma, layer.beta))
        statistics = statistics_of(layer)
        self.register_buffer("running_mean", torch.from_numpy(statistics.mean).float())
        self.register_buffer("running_var", torch.from_numpy(statistics.var).float())
        self.weight_of_old = layer.momentum
        self.momentum = 1.0 - layer.momentum
        self.eps = layer.epsilon
        self.num_features = keras_layers.channels_of(layer)


def _parameter(variable: Any, trained: set[int]) -> nn.Parameter | None:
    if variable is None:
        return None
    values = torch.from_numpy(keras_layers.as_numpy(variable))
    return nn.Parameter(values, requires_grad=id(variable) in trained)


def mirrored(model: Any, found: list[keras_layers.Found]) -> tuple[nn.Module, tuple[Layer, ...]]:
    """Return a module in the place of the model, whose class has the same name, and its layers."""
    trained = {id(variable) for variable in model.trainable_variables}
    modules = [_named(type(each.module), Mirror)(each.module, trained) for each in found]
    whole = _named(type(model), nn.ModuleList)(modules)
    return whole, tuple(_layer(each, module) for each, module in zip(found, modules, strict=True))


def _named(kind: type[Any], base: type[Any]) -> Any:
    return type(kind.__name__, (base,), {})


def _layer(found: keras_layers.Found, mirror: Mirror) -> Layer:
    # A layer that is frozen normalizes by its moving statistics, and does not update them.
    trains = bool(found.module.trainable)
    statistics = statistics_of(found.module)
    running = Statistics(*(torch.from_numpy(values)[None] for values in statistics))
    return Layer(Found(mirror, found.paths, ()), running, updates_running=trains, by_batch=trains)
