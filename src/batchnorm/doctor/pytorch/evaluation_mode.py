"""Find the layers that run in training mode when the model is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from batchnorm.walk import restored

Evaluate = Callable[[nn.Module], Any]


def left_in_training(model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the paths of those of the layers, given by path, that are in training mode after `model.eval()`."""
    with restored(model):
        model.eval()
        return tuple(path for path, layer in layers.items() if layer.training)


def evaluated_in_training(model: nn.Module, layers: Mapping[str, nn.Module], evaluate: Evaluate) -> tuple[str, ...]:
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
        for path, layer in layers.items():
            layer.register_forward_pre_hook(recorder(path))
        model.train()
        evaluate(model)
    return tuple(found)
