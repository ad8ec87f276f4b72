"""The layers that folding changes, with their weights in float64, for any kind of graph.

Each kind of graph has subclasses that read and write such layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.surgery.fold import arithmetic
from batchnorm.surgery.fold.arithmetic import ScaleShift

if TYPE_CHECKING:
    from typing_extensions import Self


class CannotFold(Exception):
    """The reason why a batch normalization stays where it is."""


class Window(NamedTuple):
    """The positions that a convolution reads.

    Attributes:
        stride: Along each dimension.
        dilation: Along each dimension.
        padding: The zeros before and after each dimension; None if they depend on the input's size.
        enlarged: Whether a transposed convolution's output is larger than its kernel reaches.
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | None
    enlarged: bool = False


_NO_WINDOW = Window((), (), ())


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear:
    """A convolution, transposed convolution, linear layer or product with a constant matrix.

    Attributes:
        kind: The operation. Only layers of the same kind can become one.
        weight: float64, in the layout that `arithmetic` describes.
        bias: `[out]`, float64, or None.
        border: The kernel for a shift that was applied before padding or a transposed convolution, float64, or None.
            The operation with this kernel and one input channel, applied to ones, is added to the result.
        groups: Groups of channels; 1 for a linear layer.
        window: The positions that it reads; a linear layer has no dimensions.
        options: The remaining arguments of a convolution, by name.
        transposed: Whether it is a transposed convolution.
        takes_bias: Whether the call has an argument for a bias.
        opaque: Whether it is unknown how the input is used.
    """

    kind: Any
    weight: Tensor
    bias: Tensor | None = None
    border: Tensor | None = None
    groups: int = 1
    window: Window = _NO_WINDOW
    options: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    takes_bias: bool = True
    opaque: bool = False

    @property
    def dims(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        return self.weight.dim() - 2

    @property
    def out_channels(self) -> int:
        """Size of the result's channel axis."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Size of the input's channel axis."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    def channel_axis(self, rank: int) -> int:
        """Return the channel axis of an input or result of this rank."""
        if self.dims and rank != self.dims + 2:
            raise CannotFold("the convolution next to it has no batch axis")
        return 1 if self.dims else rank - 1

    def after(self, s: ScaleShift) -> Self:
        """Return the layer followed by this scale and shift, `[out_channels]`."""
        weight, bias = arithmetic.into_producer(
            self.weight, self.bias, s, groups=self.groups, transposed=self.transposed
        )
        border = self.border
        if border is not None:
            shape = (1, -1) if self.transposed else (-1, 1)
            border = border * s.scale.reshape(*shape, *(1,) * self.dims)
        return replace(self, weight=weight, bias=bias, border=border)

    def before(self, s: ScaleShift) -> Self:
        """Return the layer preceded by this scale and shift, `[in_channels]`."""
        if self.opaque:
            raise CannotFold("how the layer next to it uses its input is not known")
        weight, kernel = arithmetic.into_consumer(self.weight, s, groups=self.groups, transposed=self.transposed)
        if not s.shifts:
            return replace(self, weight=weight)
        if self._sees_whole_kernel():
            along = kernel.transpose(0, 1) if self.transposed else kernel
            return replace(self, weight=weight, bias=self._bias_plus(arithmetic.interior(along)))
        return replace(self, weight=weight, border=kernel if self.border is None else self.border + kernel)

    def negated(self) -> Self:
        """Return the layer with the opposite sign."""
        return self.after(
            ScaleShift(
                -torch.ones(self.out_channels, device="cpu").double(),
                torch.zeros(self.out_channels, device="cpu").double(),
            )
        )

    def _bias_plus(self, more: Tensor) -> Tensor | None:
        if self.bias is None:
            return more if bool((more != 0).any()) else None
        return self.bias + more

    def _sees_whole_kernel(self) -> bool:
        """Return whether the whole kernel is inside the input for every output."""
        window = self.window
        pointwise = {*self.weight.shape[2:], *window.stride} == {1}
        padded = not pointwise if window.padding is None else any(map(any, window.padding))
        return not padded and (not self.transposed or (pointwise and not window.enlarged))


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm:
    """Batch normalization with fixed statistics.

    Attributes:
        scale_shift: `[C]`, including what was folded into it.
    """

    scale_shift: ScaleShift

    def __post_init__(self) -> None:
        if not (self.scale_shift.scale.isfinite().all() and self.scale_shift.shift.isfinite().all()):
            raise CannotFold("its scale or shift is not finite")

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.scale_shift.scale.numel()

    out_channels = in_channels

    def channel_axis(self, rank: int) -> int:
        """Return 1."""
        return 1

    def after(self, s: ScaleShift) -> Self:
        """Return the batch normalization followed by this scale and shift."""
        return replace(self, scale_shift=self.scale_shift.then(s))

    def before(self, s: ScaleShift) -> Self:
        """Return the batch normalization preceded by this scale and shift."""
        return replace(self, scale_shift=s.then(self.scale_shift))


@dataclass(frozen=True, eq=False)
class NewConstants:
    """A call that reads constants whose values have changed, such as the addition of a parameter.

    Attributes:
        values: The new values of some of its inputs, float64.
    """

    values: dict[Any, Tensor]


Layer = Linear | Norm
State = Layer | NewConstants
