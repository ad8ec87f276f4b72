"""Batch normalization as other libraries define it: frozen, or with modules that are applied to its result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _FourBuffers(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def normalized(self, x: Tensor, eps: float) -> Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var.reshape(1, -1, 1, 1) + eps).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale)


class Torchvision(_FourBuffers):
    """torchvision.ops.FrozenBatchNorm2d: ε is an argument, and a counter in a checkpoint is dropped."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.eps = eps

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x, self.eps)


class Detectron2(_FourBuffers):
    """detectron2.layers.FrozenBatchNorm2d: a counter that is None, and another formula without gradients."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features)
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.reshape(1, -1, 1, 1).to(x.dtype)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class Detr(_FourBuffers):
    """DETR's FrozenBatchNorm2d: ε is 1e-5."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x, 1e-5)


class MaskRCNN(_FourBuffers):
    """maskrcnn-benchmark's FrozenBatchNorm2d: no ε."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x, 0.0)


FOREIGN: dict[str, type[nn.Module]] = {
    "torchvision": Torchvision, "detectron2": Detectron2, "detr": Detr, "maskrcnn": MaskRCNN,
}  # fmt: skip


class TimmAct(nn.BatchNorm2d):
    """timm's BatchNormAct2d: act(drop(BN(x)))."""

    def __init__(self, num_features: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4D input")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        training = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class TimmSyncAct(nn.SyncBatchNorm):
    """timm's SyncBatchNormAct."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act, self.drop = nn.SiLU(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class TimmFrozenAct(_FourBuffers):
    """timm's FrozenBatchNormAct2d."""

    def __init__(self, num_features: int, act: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.eps = 1e-3
        self.drop, self.act = nn.Identity(), nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.normalized(x, self.eps)))


def drawn(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer, with values of its own in all its tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer
