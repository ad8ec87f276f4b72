"""Models in which every batch normalization can be folded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm as bn


class Sum(nn.Module):
    """Branches of one input, added."""

    def __init__(self, *branches: nn.Module, last: nn.Module | None = None) -> None:
        super().__init__()
        self.branches, self.last = nn.ModuleList(branches), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(sum(branch(x) for branch in self.branches))


class Difference(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.left(x) - self.right(x))


class Concatenated(nn.Module):
    def __init__(self, *branches: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.branches, self.last = nn.ModuleList(branches), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([branch(x) for branch in self.branches], dim=1))


class Permuted(nn.Module):
    """Batch normalization of [N, L, C] between two transpositions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.linear(x).transpose(1, 2)).permute(0, 2, 1))


class LinearFlattened(nn.Module):
    """LeViT's layer: the tokens of all images are one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(y.flatten(0, 1)).reshape_as(y)


class Split(nn.Module):
    """Parts of a projection that are normalized each on its own, and one normalization that is split."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.query, self.value = nn.Conv2d(4, 9, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.both, self.left, self.right = nn.BatchNorm2d(4), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.split(self.project(x), [2, 3, 4], dim=1)
        left, right = self.both(F.softplus(self.value(v))).chunk(2, dim=1)
        return torch.cat([torch.sin(self.query(q)), k, self.left(left), self.right(right)], 1)


class Functional(nn.Module):
    """Batch normalization that is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        y = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, self.training)
        return F.relu(y, inplace=True)


class Subclass(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        return F.relu_(super().forward(x))


IMAGE, SIGNAL, VOLUME = (2, 4, 9, 9), (2, 4, 9), (2, 4, 5, 6, 7)


POOLED = (nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(3, 2, 1), nn.Dropout(0.5), nn.Identity())


PATTERNS = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, dilation=2), nn.BatchNorm1d(6)), SIGNAL),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), VOLUME),
    "same padding": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.BatchNorm2d(6)), IMAGE),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, stride=2), nn.BatchNorm2d(8)), IMAGE),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2, bias=False), nn.BatchNorm2d(6)), IMAGE,
    ),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)), SIGNAL),
    "transposed 3d": (lambda: nn.Sequential(nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d(6)), VOLUME),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    "linear, permuted": (Permuted, (2, 5, 6)),
    "linear, flattened": (LinearFlattened, (2, 5, 6)),
    "before linear": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)), (3, 4)),
    "before conv": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), IMAGE),
    "before zero padding": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=2, stride=2)), IMAGE),
    "before padding by name": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2)), IMAGE,
    ),
    "before zero padding 1d": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3, padding=1)), SIGNAL),
    "before zero padding 3d": (lambda: nn.Sequential(nn.BatchNorm3d(4), nn.Conv3d(4, 6, 3, padding=1)), VOLUME),
    "before transposed": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2)), IMAGE,
    ),
    "before pointwise transposed": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1)), IMAGE),
    **{
        f"before {mode} padding": (
            lambda mode=mode: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode)), IMAGE,
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "before and after": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), IMAGE,
    ),
    "twice": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), IMAGE),
    "twice, before": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE),
    "average pooling": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.BatchNorm2d(6)), IMAGE),
    "padded average pooling": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Conv2d(4, 6, 3)
        ), IMAGE,
    ),
    "flattening": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(324, 5)), IMAGE),
    "flattening, after": (lambda: nn.Sequential(nn.Conv2d(4, 6, 9), nn.Flatten(), nn.BatchNorm1d(6)), IMAGE),
    "global pooling": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)), IMAGE,
    ),
    "upsampling": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 6, 3)),
        IMAGE,
    ),
    "addition": (
        lambda: Sum(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 1, padding=1), last=nn.BatchNorm2d(6)), IMAGE,
    ),
    "concatenation": (
        lambda: Concatenated(nn.Conv2d(4, 6, 3), nn.Conv2d(4, 3, 5, padding=1), last=nn.BatchNorm2d(9)), IMAGE,
    ),
    "part of a concatenation": (
        lambda: Concatenated(
            nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4)), nn.ReLU(), last=nn.Conv2d(8, 5, 3, padding=1)
        ), IMAGE,
    ),
    "parallel branches": (
        lambda: Sum(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)), nn.BatchNorm2d(4), last=nn.ReLU(),
        ), IMAGE,
    ),
    "parallel branches, the input and a difference": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 1), Difference(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)),
            Sum(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Identity(), last=nn.BatchNorm2d(6)),
        ), IMAGE,
    ),
    "parallel depthwise branches": (
        lambda: Sum(
            nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 5, padding=2, groups=4), nn.BatchNorm2d(4)),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(4)),
        ), IMAGE,
    ),
    "parallel linear layers": (
        lambda: Sum(
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        ), (3, 4),
    ),
    "functional": (Functional, IMAGE),
    "split": (Split, IMAGE),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)), IMAGE,
    ),
    "subclass with activation": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), Subclass(6)), IMAGE),
    "our layer with activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), bn.BatchNormAct2d(6, activation="hardswish"), bn.BatchNorm2d(6),
                              nn.Conv2d(6, 3, 3)), IMAGE,
    ),
    "without affine": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGE),
    "without bias": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), bn.BatchNorm2d(6, bias=False)), IMAGE),
    **{
        name: (lambda layer=layer: nn.Sequential(nn.Conv2d(4, 6, 3), layer(6)), IMAGE)
        for name, layer in (
            ("renormalized", bn.nn.BatchRenorm2d), ("ghost", lambda c: bn.nn.GhostBatchNorm2d(c, ghost_size=2)),
            ("frozen", bn.nn.FrozenBatchNorm2d),
        )
    },
    "synchronized": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE),
}  # fmt: skip
