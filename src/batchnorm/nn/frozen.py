"""Batch normalization whose statistics are fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchnorm.foreign import VECTORS, foreign_eps
from batchnorm.nn.act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d, _BatchNormAct
from batchnorm.nn.followed import follow, followed
from batchnorm.nn.layer import NormLayer


class FrozenLayer(NormLayer):
    """A mixin before another layer class, which makes it normalize by its running statistics only."""

    _frozen = True

    def _check_tracks(self, track_running_stats: bool) -> None:
        if not track_running_stats:
            raise ValueError(
                f"{self.layer_name} expects track_running_stats=True, got False. It normalizes only by the running "
                "statistics: use BatchNorm to normalize by the batch's."
            )

    @property
    def trainable_affine(self) -> bool:
        """Whether γ or β requires a gradient; setting it sets both."""
        return any(p.requires_grad for p in self.parameters())

    @trainable_affine.setter
    def trainable_affine(self, trainable: bool) -> None:
        self.requires_grad_(trainable)
        if not trainable:
            self.zero_grad(set_to_none=True)  # with a gradient, an optimizer would still apply momentum and decay

    def extra_repr(self) -> str:
        """Describe the layer: torch's description, and whether γ and β are trained."""
        return f"{super().extra_repr()}, trainable_affine={self.trainable_affine}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if prefix + "running_mean" in state_dict and prefix + "running_var" in state_dict:
            # The checkpoint may come from batch normalization without γ or β, which then become 1 and 0.
            tracked = self.num_batches_tracked
            absent = {
                "weight": None if self.weight is None else torch.ones_like(self.weight, device=_device(self.weight)),
                "bias": None if self.bias is None else torch.zeros_like(self.bias, device=_device(self.bias)),
                "num_batches_tracked": torch.tensor(0) if tracked is None or tracked.is_meta else tracked,
            }
            for name, value in absent.items():
                if value is not None:
                    state_dict.setdefault(prefix + name, value)
        super()._load_from_state_dict(state_dict, prefix, *others)


def _device(tensor: Tensor) -> torch.device:
    """Return the tensor's device, or the CPU instead of meta."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


class FrozenBatchNorm(FrozenLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization of `[N, C, *S]` by its running statistics only, in training and in evaluation.

    `y = (x - running_mean)/√(running_var + eps)·weight + bias`. The running statistics never change. Use it for
    fine-tuning if the batches are too small for good statistics (detection, segmentation), and for layers whose data
    have not changed. `batchnorm.surgery.freeze` puts it into a model, and `unfreeze` removes it.

    Args:
        num_features: C, the size of x's second dimension.
        eps: Added to the variance; positive.
        momentum: Not used, but kept for the layer that `unfreeze` restores.
        affine: Whether there are weight (γ) and bias (β), each `[C]`.
        track_running_stats: Must be True. It exists so that positional arguments agree with torch's.
        device: The device of parameters and buffers.
        dtype: The dtype of parameters and buffers.
        bias: Whether there is β (keyword only).
        on_nonfinite: Not used, like momentum (keyword only).
        on_single: Not used, like momentum (keyword only).
        channel_dim: As in `BatchNorm` (keyword only).
        trainable_affine: Whether γ and β require gradients (keyword only). They are parameters in both cases.

    Shape:
        x and y: `[N, C, *S]`; one value per channel is enough.

    Raises:
        TypeError: as `BatchNorm`.
        ValueError: track_running_stats is False; otherwise as `BatchNorm`, except that any batch is accepted.

    Numerics: as `batchnorm.functional.batch_norm` with `training=False`.

    The layer loads the `state_dict` of any batch normalization. If `num_batches_tracked` is missing, it does not
    change. If γ or β is missing, it becomes 1 or 0.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` also replaces this layer, and so unfreezes it.

    Examples:
        >>> layer = FrozenBatchNorm(2)
        >>> _ = layer.load_state_dict({"running_mean": torch.tensor([1.0, 2.0]), "running_var": torch.ones(2)})
        >>> layer.train()(torch.tensor([[1.0, 2.0]]))
        tensor([[0., 0.]])
    """

    layer_name = "FrozenBatchNorm"

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        trainable_affine: bool = False,
    ) -> None:  # fmt: skip
        self._check_tracks(track_running_stats)
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.trainable_affine = trainable_affine


class FrozenBatchNorm1d(FrozenBatchNorm):
    """`FrozenBatchNorm` of `[N, C]` or `[N, C, L]`.

    Examples:
        >>> FrozenBatchNorm1d(8)(torch.rand(1, 8)).shape
        torch.Size([1, 8])
    """

    layer_name = "FrozenBatchNorm1d"


class FrozenBatchNorm2d(FrozenBatchNorm):
    """`FrozenBatchNorm` of `[N, C, H, W]`.

    Examples:
        >>> FrozenBatchNorm2d(8, trainable_affine=True)
        FrozenBatchNorm2d(8, eps=1e-05, ..., trainable_affine=True)
    """

    layer_name = "FrozenBatchNorm2d"


class FrozenBatchNorm3d(FrozenBatchNorm):
    """`FrozenBatchNorm` of `[N, C, D, H, W]`.

    Examples:
        >>> FrozenBatchNorm3d(8)(torch.rand(1, 8, 2, 3, 3)).shape
        torch.Size([1, 8, 2, 3, 3])
    """

    layer_name = "FrozenBatchNorm3d"


class _FrozenAct(FrozenLayer, _BatchNormAct):
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        activation: str = "relu", negative_slope: float = 0.01,
        alpha: float = 1.0, trainable_affine: bool = False,
    ) -> None:  # fmt: skip
        self._check_tracks(track_running_stats)
        super().__init__(
            num_features, eps, momentum, affine, True, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
            activation=activation, negative_slope=negative_slope, alpha=alpha,
        )  # fmt: skip
        self.trainable_affine = trainable_affine


class FrozenBatchNormAct1d(_FrozenAct, BatchNormAct1d):
    """`BatchNormAct1d` by its running statistics only; see `FrozenBatchNormAct2d`."""

    layer_name = "FrozenBatchNormAct1d"


class FrozenBatchNormAct2d(_FrozenAct, BatchNormAct2d):
    """`BatchNormAct2d` by its running statistics only, in training and in evaluation.

    The arguments are those of `BatchNormAct2d` and `FrozenBatchNorm`.

    Examples:
        >>> layer = FrozenBatchNormAct2d(8, activation="silu", trainable_affine=True)
        >>> layer(torch.rand(1, 8, 5, 5), residual=torch.rand(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    layer_name = "FrozenBatchNormAct2d"


class FrozenBatchNormAct3d(_FrozenAct, BatchNormAct3d):
    """`BatchNormAct3d` by its running statistics only; see `FrozenBatchNormAct2d`."""

    layer_name = "FrozenBatchNormAct3d"


def adopted(layer: torch.nn.Module) -> FrozenLayer:
    """Return a frozen layer with the tensors of another library's, which has a `foreign_eps`.

    It is a `FrozenBatchNorm2d`, or a `FrozenBatchNormAct2d` with the modules that the other layer applies.
    """
    eps = foreign_eps(layer)
    assert eps is not None
    vectors: dict[str, Tensor] = {name: getattr(layer, name) for name in VECTORS}
    mean = vectors["running_mean"]
    modules = {name: module for name, module in layer._modules.items() if module is not None}
    kind: Any = followed(FrozenBatchNormAct2d) if modules else FrozenBatchNorm2d
    new: FrozenLayer = kind(mean.numel(), device="meta", **({"activation": "none"} if modules else {}))
    follow(new, modules)
    new.eps = eps  # not checked, because it is 0 in old versions of torchvision
    for name, vector in vectors.items():
        if name in new._parameters:
            new._parameters[name] = torch.nn.Parameter(vector.detach(), requires_grad=False)
        else:
            new._buffers[name] = vector
    new.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=mean.device)
    return new.train(layer.training)
