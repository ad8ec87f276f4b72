"""The layers that `convert` converts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from batchnorm.nn import batch, conditional, decorrelated, domain, frozen, ghost, renorm, sync

SHAPES = {"1d": (6, 4, 5), "2d": (6, 4, 3, 5), "3d": (6, 4, 3, 2, 3)}

# Each algorithm, with options that make it plain batch normalization of a batch, so that outputs can be compared.
FAMILY: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "BatchNorm": (batch.BatchNorm, {}),
    "BatchRenorm": (renorm.BatchRenorm, {"rmax": 1.0, "dmax": 0.0}),
    "GhostBatchNorm": (ghost.GhostBatchNorm, {"ghost_size": 6}),
    "SyncBatchNorm": (sync.SyncBatchNorm, {}),
    "FrozenBatchNorm": (frozen.FrozenBatchNorm, {}),
    "DomainBatchNorm": (domain.DomainBatchNorm, {"num_domains": 2}),
    "ConditionalBatchNorm": (conditional.ConditionalBatchNorm, {"num_classes": 3}),
    "DecorrelatedBatchNorm": (decorrelated.DecorrelatedBatchNorm, {"group_size": 1}),
}

CALLED_PLAINLY = ("BatchNorm", "BatchRenorm", "GhostBatchNorm", "SyncBatchNorm")


def trained(rank: str = "2d", **options: Any) -> nn.Module:
    """Return a torch layer with random parameters and statistics."""
    layer = getattr(nn, f"BatchNorm{rank}")(4, **options)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(5)
    return layer
