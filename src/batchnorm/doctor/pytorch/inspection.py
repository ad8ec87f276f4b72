"""The facts of a model's layers, without a diagnosis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm import _checks
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.doctor.measure.facts import LayerFacts, facts_of
from batchnorm.doctor.pytorch.measuring import add_trace, measure_model, modules_of
from batchnorm.models.data.batches import device_of
from batchnorm.models.data.inputs import Inputs, evaluate, not_taken
from batchnorm.models.execution.calling import eager
from batchnorm.walk import check_has_values, norm_layers, restored, set_mode


def inspect_layers(model: nn.Module, example_inputs: Any = None) -> tuple[LayerFacts, ...]:
    """Return the facts of every layer of batch normalization, in the model's order; the model stays unchanged.

    Args:
        model: The network.
        example_inputs: A tensor, a tuple or a dict of arguments for the model, to find the place of each layer. By
            default, random inputs of common sizes are tried.

    Raises:
        TypeError: model is not a module.
        ValueError: the model has no batch normalization, or lazy layers before their first batch; its parameters are
            sharded; it fails when called with example_inputs.

    Examples:
        >>> (layer,) = inspect_layers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> layer.path, layer.after, layer.before, layer.foldable
        ('1', '0 (conv2d)', 'relu', True)
    """
    check_model("inspect_layers", model)
    check_not_sharded("inspect_layers", model)
    with restored(model, buffers=True), eager():
        measurements = measure_model(model)
        set_mode(model, training=False)
        inputs = guessed_inputs(model) if example_inputs is None else _checked_inputs(model, example_inputs)
        measurements = add_trace(measurements, model, modules_of(model), inputs)
    return facts_of(measurements)


def _checked_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    inputs = Inputs.of(example_inputs)
    try:
        evaluate(model, inputs)
    except Exception as error:
        raise not_taken("inspect_layers", "inputs", error) from error
    return inputs


def check_model(caller: str, model: Any) -> None:
    """Check that the model is a module with batch normalization that can be examined."""
    _checks.check_module(caller, model)
    layers = norm_layers(model)
    if not layers:
        raise ValueError(
            f"{caller} expects a model with batch normalization, got {type(model).__name__} without any. Scripted and "
            "exported models no longer contain layers: pass the original model."
        )
    lazy = [f.path for f in layers if any(is_lazy(t) for t in (*f.module.parameters(), *f.module.buffers()))]
    if lazy:
        raise ValueError(
            f"{caller} expects layers that know their channels, got {lazy[0]!r}, which has not seen a batch. "
            "Run the model once first."
        )
    check_has_values(caller, model)


_SIZES = {
    nn.Conv1d: ((64,), (1024,)),
    nn.Conv2d: ((64, 64), (28, 28), (224, 224)),
    nn.Conv3d: ((16, 32, 32), (32, 112, 112)),
    nn.Linear: ((),),
    nn.BatchNorm1d: ((), (64,)),
    nn.BatchNorm2d: ((64, 64), (224, 224)),
    nn.BatchNorm3d: ((16, 32, 32),),
}


@torch.no_grad()
def guessed_inputs(model: nn.Module) -> Inputs | None:
    """Return random input of a common size that the model accepts; None if it accepts none."""
    for layer in model.modules():
        kind = next((kind for kind in _SIZES if isinstance(layer, kind)), None)
        if kind is None:
            continue
        channels = next(getattr(layer, n) for n in ("in_channels", "in_features", "num_features") if hasattr(layer, n))
        like: Tensor | None = next((p for p in model.parameters() if p.is_floating_point()), None)
        for sizes in _SIZES[kind]:
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, channels, *sizes, generator=generator, device="cpu")
            x = x if like is None else x.to(device_of(model), like.dtype)
            try:
                model(x)
            except Exception:  # the model expects another size
                continue
            return Inputs((x,))
        return None
    return None
