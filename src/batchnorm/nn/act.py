"""Batch normalization, residual addition and activation in one operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from batchnorm import _options, ops
from batchnorm.nn.layer import Check, NormLayer, one_of


class _BatchNormAct(NormLayer):
    _checked: ClassVar[Mapping[str, Check]] = {
        **NormLayer._checked,
        "activation": one_of("activation", ops.ACTIVATIONS),
        "alpha": _options.check_alpha,
    }

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        activation: str = "relu", negative_slope: float = 0.01,
        alpha: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.activation = activation
        self.negative_slope = negative_slope
        self.alpha = alpha

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return `activation(BN(x) + residual)`. The residual has x's shape and dtype; for `mask` see `BatchNorm`."""
        return self._normalize(x, residual, mask)

    def extra_repr(self) -> str:
        """Describe the batch normalization and the activation."""
        parts = [super().extra_repr(), f"activation={self.activation!r}"]
        if parameter := ops.ACTIVATIONS[self.activation].parameter:
            parts.append(f"{parameter}={getattr(self, parameter)}")
        return ", ".join(parts)


class BatchNormAct2d(_BatchNormAct):
    """`activation(BN(x) + residual)` for x of shape `[N, C, H, W]`, faster and with less memory than separate layers.

    The layer has the `state_dict` of `BatchNorm2d`. It deliberately does not derive from torch's `_BatchNorm`, because
    tools that replace or fold batch normalization by `isinstance` would silently lose the activation.

    Args:
        num_features: C. All arguments that are not listed here are those of `BatchNorm`.
        activation: "relu" (default), or another activation of `batchnorm.functional.batch_norm` (keyword only).
        negative_slope: Slope of "leaky_relu" below zero (keyword only).
        alpha: α of "elu" (keyword only).

    Raises:
        ValueError: as `BatchNorm`; an unknown activation; an alpha that is not finite; in forward, a residual whose
            shape differs from x's.

    Numerics: autograd keeps x and `[C]` vectors. With a residual, it also keeps y if y determines the derivative of the
        activation (the ReLUs), and otherwise the residual.

    Examples:
        >>> import torch
        >>> layer = BatchNormAct2d(8, activation="silu")
        >>> layer(torch.rand(4, 8, 5, 5), residual=torch.rand(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    layer_name = "BatchNormAct2d"


class BatchNormAct1d(_BatchNormAct):
    """`activation(BN(x) + residual)` for x of shape `[N, C]` or `[N, C, L]`; see `BatchNormAct2d`."""

    layer_name = "BatchNormAct1d"


class BatchNormAct3d(_BatchNormAct):
    """`activation(BN(x) + residual)` for x of shape `[N, C, D, H, W]`; see `BatchNormAct2d`."""

    layer_name = "BatchNormAct3d"
