"""Batch normalization whose weight and bias depend on the sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from batchnorm.nn import batch
from batchnorm.nn.rows import RowsLayer, batch_norm_by_rows, check_row


class ConditionalBatchNorm(RowsLayer, torch.nn.modules.batchnorm._BatchNorm):
    """Batch normalization with γ and β of each sample, for `[N, C, *S]` with any number of spatial dimensions.

    `y = (x - μ)/√(σ² + eps)·γₙ + βₙ`. Statistics are the whole batch's, as in `BatchNorm`, and so are the running
    ones. γₙ and βₙ are the rows of a sample's class, learned here (`layer(x, label)`), or computed elsewhere from
    whatever the sample depends on (`layer(x, weight=γ, bias=β)`).

    Args:
        num_features: C; it and the arguments up to `on_nonfinite` are those of `BatchNorm`.
        eps: As in `BatchNorm`.
        momentum: As in `BatchNorm`.
        affine: As in `BatchNorm`; without `num_classes` there are no parameters in any case.
        track_running_stats: As in `BatchNorm`.
        device: As in `BatchNorm`.
        dtype: As in `BatchNorm`.
        bias: As in `BatchNorm`.
        on_nonfinite: As in `BatchNorm`.
        num_classes: K, the rows of weight (γ, initially 1) and bias (β, initially 0), each `[K, C]`; None: every call
            brings them (keyword only).

    Shape:
        x and y: `[N, C, *S]`; label: an int for all samples, or int64 `[N]`; weight and bias in the call: `[N, C]`.

    The state of plain batch normalization loads, strictly, into every class (without `num_classes`, if it has no
    parameters); `select` gives the plain layer of one class.

    Raises:
        TypeError: as `BatchNorm`; the label is neither an int nor an int64 tensor.
        ValueError: as `BatchNorm`; neither a label nor weight and bias are given, or both; the label is out of range
            (of a tensor on the CPU) or not of shape `[N]`; weight or bias is not `[N, C]`.

    Numerics: as `batchnorm.functional.batch_norm`. The gradients of weight and bias are dense. As a `_BatchNorm` it is
    found by tools that look for one, but it is no `BatchNorm2d`, whose vectors are `[C]`.

    Source: de Vries et al. 2017, Modulating early visual processing by language; Dumoulin et al. 2017, A Learned
    Representation For Artistic Style (the rows of a class); the derivative is in the mathematics page, "Backward".

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
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        on_nonfinite: str = "propagate",
        num_classes: int | None = None,
    ) -> None:
        if num_classes is not None and (
            not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1
        ):
            raise ValueError(
                f"{self.layer_name} expects num_classes to be an int >= 1 or None, got {num_classes!r}. "
                "Pass how many classes there are, or None to pass weight and bias in each call."
            )
        if num_classes is not None and not affine:
            raise ValueError(
                f"{self.layer_name} expects affine=True with num_classes, got affine=False and num_classes="
                f"{num_classes}. Leave out num_classes to pass weight and bias in each call."
            )
        super().__init__(
            num_features,
            eps,
            momentum,
            affine and num_classes is not None,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            on_nonfinite=on_nonfinite,
        )
        self.num_classes = num_classes
        if num_classes is not None:
            self._make_rows(num_classes, ("weight", "bias"))

    def forward(  # type: ignore[override]  # a label comes second: no caller passes a mask unasked
        self,
        input: Tensor,
        label: int | Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return y for x of the shape that the layer names, with the affine of a label or the one given here.

        Args:
            input: x, `[N, C, *S]`.
            label: The class of all samples, or int64 `[N]`.
            mask: Which positions count, as in `batchnorm.functional.batch_norm`.
            weight: γ, `[N, C]`, in place of a label; None for 1.
            bias: β, `[N, C]`, in place of a label; None for 0.
        """
        rows, choice = self._rows(input, label, weight, bias)
        if label is not None:
            weight, bias = self.weight, self.bias
        moves = self.training and self.track_running_stats and self.update_running_stats
        tracked = moves or not self.training
        return batch_norm_by_rows(
            input,
            choice,
            rows,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if moves else None,
            weight,
            bias,
            mask,
            own_statistics=False,
            training=self.training or self.running_mean is None,
            momentum=self.momentum,
            eps=self.eps,
            on_nonfinite=self.on_nonfinite,
            caller=self.layer_name,
            name="label",
        )

    def _rows(
        self, x: Tensor, label: int | Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[int, int | Tensor]:
        """How many rows there are, and which one each sample takes."""
        given = weight is not None or bias is not None
        if given == (label is not None):
            what = "both" if given else "neither"
            raise ValueError(
                f"{self.layer_name} expects a label, or weight and bias of each sample, got {what}. "
                "Call layer(x, label), or layer(x, weight=weight, bias=bias)."
            )
        if label is not None:
            if self.num_classes is None:
                raise ValueError(
                    f"{self.layer_name} expects weight and bias of each sample, as it has none of its own, got a "
                    "label. Make it with num_classes=, or call layer(x, weight=weight, bias=bias)."
                )
            return self.num_classes, label
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and not has_torch_function_variadic(x, tensor) and tensor.shape != x.shape[:2]:
                raise ValueError(
                    f"{self.layer_name} expects {name} of shape [N, C] = {list(x.shape[:2])} for x of shape "
                    f"{list(x.shape)}, got {list(tensor.shape)}. Pass one row for each sample."
                )
        return x.shape[0], torch.arange(x.shape[0], device=x.device)

    def select(self, label: int) -> batch.BatchNorm | batch.BatchNorm1d | batch.BatchNorm2d | batch.BatchNorm3d:
        """Return plain batch normalization with the statistics, and copies of one class's weight and bias.

        Raises:
            ValueError: label is not in `[0, num_classes)`, or there are no classes.
        """
        if self.num_classes is None:
            raise ValueError(
                f"{self.layer_name} expects num_classes to select one of them, got None. "
                "Its weight and bias are whatever each call brings."
            )
        check_row(self.layer_name, "label", label, self.num_classes)
        return self._plain(label)

    def extra_repr(self) -> str:
        """The description of batch normalization, then the classes."""
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
