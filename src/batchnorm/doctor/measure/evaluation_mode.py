"""Find the layers that run in training mode when the model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from batchnorm.doctor.measure.layers import Layer
from batchnorm.walk import restored

Evaluate = Callable[[nn.Module], Any]


def left_in_training(model: nn.Module, layers: Iterable[Layer]) -> tuple[str, ...]:
    """Return the paths of the layers that are in training mode after `model.eval()`."""
    with restored(model):
        model.eval()
        return tuple(layer.path for layer in layers if layer.by_batch and layer.module.training)


def evaluated_in_training(model: nn.Module, layers: Iterable[Layer], evaluate: Evaluate) -> tuple[str, ...]:
    """Return the paths of the layers that the user's evaluation runs in training mode, in the order of the calls.

    The evaluation begins in training mode, as after an epoch of training. Everything is restored afterwards.
    """
    found: dict[str, None] = {}

    def recorder(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if module.training:
                found[path] = None

        return hook

    with restored(model, buffers=True, gradients=True):
        for layer in layers:
            if layer.by_batch:
                layer.module.register_forward_pre_hook(recorder(layer.path))
        model.train()
        evaluate(model)
    return tuple(found)
