"""How a scale and shift go into a convolution, transposed convolution or linear layer, however its graph is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from batchnorm.surgery.fold import arithmetic
from batchnorm.surgery.fold.arithmetic import ScaleShift

if TYPE_CHECKING:
    from typing_extensions import Self


class LinearLayer(ABC):
    """Weight, bias and border in float64; immutable.

    Attributes:
        weight: As `arithmetic` has it.
        bias: `[out]`, or None.
        border: The kernel of what is added for a shift that stood before padding or a transposed convolution, or None.
    """

    weight: Tensor
    bias: Tensor | None
    border: Tensor | None

    @property
    @abstractmethod
    def dims(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""

    @property
    @abstractmethod
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """1 for a linear layer."""

    @abstractmethod
    def _sees_whole_kernel(self) -> bool:
        """Whether every output has all of the kernel inside the input."""

    @abstractmethod
    def _with(self, **changes: Any) -> Self:
        """The same with other tensors."""

    @property
    def out_channels(self) -> int:
        """Length of the bias."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        """Size of the input's channel axis."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    def after(self, s: ScaleShift) -> Self:
        """With this scale and shift `[out]` after it."""
        weight, bias = arithmetic.into_producer(
            self.weight, self.bias, s, groups=self.groups, transposed=self.transposed
        )
        border = self.border
        if border is not None:
            shape = (1, -1) if self.transposed else (-1, 1)
            border = border * s.scale.reshape(*shape, *(1,) * self.dims)
        return self._with(weight=weight, bias=bias, border=border)

    def before(self, s: ScaleShift) -> Self:
        """With this scale and shift `[in]` before it."""
        if self.dims == 0:
            return self._with(weight=self.weight * s.scale, bias=self._bias_plus(self.weight @ s.shift))
        weight, kernel = arithmetic.into_consumer(self.weight, s, groups=self.groups, transposed=self.transposed)
        if not s.shifts:
            return self._with(weight=weight)
        if self._sees_whole_kernel():
            along = kernel.transpose(0, 1) if self.transposed else kernel
            return self._with(weight=weight, bias=self._bias_plus(arithmetic.interior(along)))
        return self._with(weight=weight, border=kernel if self.border is None else self.border + kernel)

    def _bias_plus(self, more: Tensor) -> Tensor | None:
        return more if self.bias is None else self.bias + more
