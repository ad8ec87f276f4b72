"""Input with correlated channels, and layers that have seen some."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def correlated(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Values whose channels are correlated, with variances that differ by up to 100."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    mix = torch.randn(channels, channels, generator=generator, dtype=torch.float64) + torch.eye(channels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.einsum("cd,nd...->nc...", mix, x).add(3.0).to(dtype)


def trained(layer: Any, *shape: int) -> Any:
    """`layer` with γ, β and running statistics unlike those it begins with."""
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for seed in (1, 2):
        layer(correlated(*shape, seed=seed).to(layer.running_mean.dtype))
    return layer
