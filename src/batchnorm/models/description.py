"""Describe layers of PyTorch in messages and reports."""

from __future__ import annotations

from torch import nn

from batchnorm.nn.followed import plain_class
from batchnorm.walk import class_of, is_batch_norm, num_channels


def describe(layer: nn.Module, kind: type[nn.Module] | None = None) -> str:
    """Return a short description of the layer, such as `BatchNorm2d(64)`, with its own class or the class `kind`."""
    name = (kind or class_of(layer)).__name__
    sizes = [getattr(layer, name) for name in ("num_groups", "num_features", "num_channels") if hasattr(layer, name)]
    if not sizes and is_batch_norm(layer):
        sizes = [num_channels(layer)]
    described = f"{name}({', '.join(map(str, sizes))})" if sizes else name
    # A layer of another library may apply an activation, which its description then includes.
    act = layer._modules.get("act") if kind is None and plain_class(type(layer)) is not type(layer) else None
    return described if act is None or isinstance(act, nn.Identity) else f"{described} + {type(act).__name__}"
