"""Batch normalization whose weight and bias depend on the sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from batchnorm.nn.rows import PlainBatchNorm, RowsLayer, checked_number_of_rows, checked_row


class ConditionalBatchNorm(RowsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization with γ and β of each sample, for `[N, C, *S]` with any number of spatial dimensions.

    `y = (x - μ)/√(σ² + eps)·γₙ + βₙ`. Statistics and running statistics are those of the whole batch, as in
    `BatchNorm`. γₙ and βₙ are either the learned rows of the sample's class (`layer(x, label)`), or computed elsewhere
    (`layer(x, weight=γ, bias=β)`).

    Args:
        num_features: C. All arguments that are not listed here are those of `BatchNorm`.
        affine: Whether the layer has weight and bias. Without `num_classes`, it never has.
        num_classes: K. Weight (γ, initially 1) and bias (β, initially 0) are `[K, C]`. With None, every call passes
            weight and bias (keyword only).

    Shape:
        x and y: `[N, C, *S]`; label: an int for all samples, or int64 `[N]`; weight and bias in the call: `[N, C]`.

    The `state_dict` of plain batch normalization loads (with `strict=True`) into every class; without `num_classes`,
    only if it has no parameters. `select` returns the plain layer of one class.

    Raises:
        TypeError: as `BatchNorm`; the label is neither an int nor an int64 tensor.
        ValueError: as `BatchNorm`; neither a label nor weight and bias are given, or both; the label is out of range
            (checked for tensors on the CPU only) or its shape is not `[N]`; weight or bias is not `[N, C]`.

    Numerics: as `batchnorm.functional.batch_norm`. The gradients of weight and bias are dense. The layer is a torch
    `_BatchNorm`, but not a `BatchNorm2d`, because tools expect vectors `[C]` there.

    Source: de Vries et al. 2017, Modulating early visual processing by language; Dumoulin et al. 2017, A Learned
    Representation For Artistic Style (the rows of a class); the derivative is on the mathematics page, "Backward".

    Examples:
        >>> layer = ConditionalBatchNorm(1, num_classes=2)
        >>> with torch.no_grad():
        ...     layer.weight[1] = 10.0
        >>> x = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
        >>> layer(x, torch.tensor([0, 0, 1, 1])).detach().round(decimals=3)
        tensor([[ -1.],
                [  1.],
                [-10.],
                [ 10.]])
    """

    layer_name = "ConditionalBatchNorm"

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        bias: bool = True, on_nonfinite: str = "propagate", on_single: str = "error", channel_dim: int = 1,
        num_classes: int | None = None,
    ) -> None:  # fmt: skip
        if num_classes is not None:
            hint = "Pass the number of classes, or None to pass weight and bias in each call."
            requirement = f"{self.layer_name} expects num_classes to be an int >= 1 or None"
            num_classes = checked_number_of_rows(requirement, num_classes, hint)
        if num_classes is not None and not affine:
            raise ValueError(
                f"{self.layer_name} expects affine=True with num_classes, got affine=False and num_classes="
                f"{num_classes}. Leave out num_classes to pass weight and bias in each call."
            )
        super().__init__(
            num_features, eps, momentum, affine and num_classes is not None, track_running_stats, device, dtype,
            bias=bias, on_nonfinite=on_nonfinite, on_single=on_single, channel_dim=channel_dim,
        )  # fmt: skip
        self.num_classes = num_classes
        if num_classes is not None:
            self._make_rows(num_classes, ("weight", "bias"))

    def forward(  # type: ignore[override]  # the label is second, because generic callers pass only x
        self,
        input: Tensor,
        label: int | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return y for x of the layer's shape, with weight and bias of the label or with those passed here.

        Args:
            input: x, `[N, C, *S]`.
            label: The class of all samples, or int64 `[N]`.
            mask: The positions that count, as in `batchnorm.functional.batch_norm`.
            weight: γ, `[N, C]`, instead of a label; None for 1.
            bias: β, `[N, C]`, instead of a label; None for 0.
        """
        rows, choice = self._rows(input, label, weight, bias)
        if label is not None:
            weight, bias = self.weight, self.bias
        return self._normalize_by_rows(
            input, choice, rows, weight, bias, mask, own_statistics=False, choice_name="label"
        )

    def _rows(
        self, x: Tensor, label: int | Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[int, int | Tensor]:
        """Return the number of rows, and the row of each sample."""
        given = weight is not None or bias is not None
        if given == (label is not None):
            came = "both" if given else "neither"
            raise ValueError(
                f"{self.layer_name} expects a label, or weight and bias of each sample, got {came}. "
                "Call layer(x, label), or layer(x, weight=weight, bias=bias)."
            )
        if label is not None:
            if self.num_classes is None:
                raise ValueError(
                    f"{self.layer_name} expects weight and bias of each sample, because it has none of its own, got a "
                    "label. Create it with num_classes=, or call layer(x, weight=weight, bias=bias)."
                )
            return self.num_classes, label
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None or has_torch_function_variadic(x, tensor):
                continue
            if tensor.shape != (wanted := (x.shape[0], x.shape[self.channel_dim])):
                raise ValueError(
                    f"{self.layer_name} expects {name} of shape [N, C] = {list(wanted)} for x of shape "
                    f"{list(x.shape)}, got {list(tensor.shape)}. Pass one row for each sample."
                )
        return x.shape[0], torch.arange(x.shape[0], device=x.device)

    def select(self, label: int) -> PlainBatchNorm:
        """Return plain batch normalization with copies of the statistics and of one class's weight and bias.

        Raises:
            ValueError: label is not in `[0, num_classes)`, or there are no classes.
        """
        if self.num_classes is None:
            raise ValueError(
                f"{self.layer_name} expects num_classes to select a class, got None. "
                "Each call passes weight and bias: create the layer with num_classes= to have classes to select."
            )
        return self._plain(checked_row(self.layer_name, "label", label, self.num_classes))

    def extra_repr(self) -> str:
        """Describe the batch normalization and the classes."""
        return f"{super().extra_repr()}, num_classes={self.num_classes}"


class ConditionalBatchNorm1d(ConditionalBatchNorm):
    """`ConditionalBatchNorm` of `[N, C]` or `[N, C, L]`.

    Examples:
        >>> ConditionalBatchNorm1d(8, num_classes=10)(torch.rand(4, 8, 100), 3).shape
        torch.Size([4, 8, 100])
    """

    layer_name = "ConditionalBatchNorm1d"


class ConditionalBatchNorm2d(ConditionalBatchNorm):
    """`ConditionalBatchNorm` of `[N, C, H, W]`.

    Examples:
        >>> layer, z = ConditionalBatchNorm2d(8), torch.rand(4, 16)
        >>> gain, shift = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
        >>> layer(torch.rand(4, 8, 5, 5), weight=1 + gain(z), bias=shift(z)).shape
        torch.Size([4, 8, 5, 5])
    """

    layer_name = "ConditionalBatchNorm2d"


class ConditionalBatchNorm3d(ConditionalBatchNorm):
    """`ConditionalBatchNorm` of `[N, C, D, H, W]`.

    Examples:
        >>> ConditionalBatchNorm3d(2, num_classes=3)(torch.rand(4, 2, 3, 5, 5), torch.tensor([0, 2, 1, 1])).shape
        torch.Size([4, 2, 3, 5, 5])
    """

    layer_name = "ConditionalBatchNorm3d"
