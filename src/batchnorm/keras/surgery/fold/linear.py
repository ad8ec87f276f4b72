"""The Keras layers that absorb a scale and shift, with their weights in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from keras import activations, layers
from numpy.typing import NDArray

from batchnorm.keras.models.layers import array, channel_axis, has_own_call, largest, named

if TYPE_CHECKING:
    from typing_extensions import Self

Array = NDArray[np.float64]


class CannotFold(Exception):
    """The reason why a batch normalization stays where it is."""


@dataclass(frozen=True, eq=False)
class ScaleShift:
    """`y = scale·x + shift` along one axis of x: batch normalization in evaluation.

    Attributes:
        scale: `[C]`.
        shift: `[C]`.
        axis: The axis of the channels, not negative.
    """

    scale: Array
    shift: Array
    axis: int

    @classmethod
    def of(cls, norm: Any, rank: int) -> ScaleShift:
        """Return `s = γ/√(moving_variance + ε)` and `t = β - moving_mean·s` of batch normalization."""
        scale = 1.0 / np.sqrt(array(norm.moving_variance) + norm.epsilon)
        if norm.gamma is not None:
            scale = array(norm.gamma) * scale
        shift = -array(norm.moving_mean) * scale
        if norm.beta is not None:
            shift = array(norm.beta) + shift
        if not np.isfinite(scale + shift).all():
            raise CannotFold("its scale or shift is not finite")
        return cls(scale, shift, norm.axis % rank)

    @property
    def shifts(self) -> bool:
        """Whether any shift is not zero."""
        return bool((self.shift != 0).any())

    def unshifted(self) -> ScaleShift:
        """Return the scale alone."""
        return replace(self, shift=np.zeros_like(self.shift))

    def check_not_negative(self, name: str) -> None:
        """Check that the scale keeps the order of values.

        Raises:
            CannotFold: It does not, and the call of this name depends on the order.
        """
        if (self.scale < 0).any():
            raise CannotFold(f"{name} next to it does not commute with a negative scale")


@dataclass(frozen=True, eq=False)
class Linear:
    """A layer that is linear in its input, up to its activation.

    Subclasses define the layout of the kernels.

    Attributes:
        layer: The layer of the original.
        kernels: The kernels, by the name of the attribute.
        bias: `[out]`, or None.
    """

    layer: Any
    kernels: dict[str, Array]
    bias: Array | None

    first: ClassVar[str] = "kernel"  # the kernel that the input is multiplied by
    last: ClassVar[str] = "kernel"  # the kernel that computes the output

    @property
    def name(self) -> str:
        """The name of the layer, and its class, for messages."""
        return named(self.layer)

    @property
    def in_channels(self) -> int:
        """Size of the input's channel axis."""
        return self.kernels[self.first].shape[-2]

    @property
    def out_channels(self) -> int:
        """Size of the output's channel axis."""
        return self.kernels[self.last].shape[-1]

    def along_inputs(self, values: Array) -> Array:
        """Return values `[in]` in a shape that broadcasts against the first kernel."""
        return values[:, None]

    def along_outputs(self, values: Array) -> Array:
        """Return values `[out]` in a shape that broadcasts against the last kernel."""
        return values

    def response(self, values: Array) -> Array:
        """Return the output `[out]` for an input that is constant, `values` `[in]`, under the whole kernel."""
        kernel = self.kernels[self.first]
        return (kernel * self.along_inputs(values)).sum(axis=tuple(range(kernel.ndim - 1)))

    def sees_whole_kernel(self) -> bool:
        """Return whether the whole kernel is inside the input for every output."""
        return getattr(self.layer, "padding", "valid") == "valid" or _pointwise(self.layer)

    def after(self, s: ScaleShift, rank: int) -> Self:
        """Return the layer followed by a scale and shift of its result, which has this rank."""
        if self.layer.activation is not activations.linear:
            raise CannotFold(f"it follows the activation of {self.name}")
        self._check(s, rank, self.out_channels)
        kernel = self.kernels[self.last] * self.along_outputs(s.scale)
        bias = s.shift if self.bias is None else s.scale * self.bias + s.shift
        return replace(self, kernels={**self.kernels, self.last: kernel}, bias=bias)

    def before(self, s: ScaleShift, rank: int) -> Self:
        """Return the layer preceded by a scale and shift of its input, which has this rank."""
        self._check(s, rank, self.in_channels)
        if s.shifts and not self.sees_whole_kernel():
            raise CannotFold(f"{self.name} pads the result with zeros")
        kernel = self.kernels[self.first] * self.along_inputs(s.scale)
        bias = self.bias
        if s.shifts:
            bias = self.response(s.shift) + (0.0 if bias is None else bias)
        return replace(self, kernels={**self.kernels, self.first: kernel}, bias=bias)

    def _check(self, s: ScaleShift, rank: int, channels: int) -> None:
        if s.axis != channel_axis(self.layer, rank) or len(s.scale) != channels:
            raise CannotFold(f"its channels are not those of {self.name}")

    def assign(self, layer: Any) -> None:
        """Write the weights into a built layer of the same kind with a bias, if there is one."""
        for name, kernel in self.kernels.items():
            getattr(layer, name).assign(kernel)
        if self.bias is not None:
            layer.bias.assign(self.bias)

    def check_range(self) -> None:
        """Check that the weights are finite in the dtype in which they are stored.

        Raises:
            CannotFold: One is not.
        """
        dtype = self.layer.variable_dtype
        values = [*self.kernels.values(), *([] if self.bias is None else [self.bias])]
        if any(not (np.abs(value) <= largest(dtype)).all() for value in values):
            raise CannotFold(f"the weights of {self.name} would not be finite in {dtype}")


class Dense(Linear):
    """A dense layer: kernel `[in, out]`."""


class Convolution(Linear):
    """A convolution: kernel `[*kernel, in / groups, out]`."""

    @property
    def in_channels(self) -> int:
        """Size of the input's channel axis."""
        return super().in_channels * int(self.layer.groups)

    def along_inputs(self, values: Array) -> Array:
        """Return `[in / groups, out]`: the values of the inputs that each output sees."""
        groups = self.layer.groups
        return np.repeat(values.reshape(groups, -1).T, self.out_channels // groups, axis=1)


class Transposed(Linear):
    """A transposed convolution: kernel `[*kernel, out, in]`."""

    @property
    def in_channels(self) -> int:
        """Size of the input's channel axis."""
        return super().out_channels

    @property
    def out_channels(self) -> int:
        """Size of the output's channel axis."""
        return super().in_channels

    along_inputs = Linear.along_outputs
    along_outputs = Linear.along_inputs

    def response(self, values: Array) -> Array:
        """Return the output `[out]` for a constant input."""
        return (self.kernels["kernel"] * values).sum(axis=-1).reshape(-1)

    def sees_whole_kernel(self) -> bool:
        """Return whether every output reads one position."""
        return _pointwise(self.layer) and set(self.layer.strides) == {1} and self.layer.output_padding is None


class Depthwise(Linear):
    """A depthwise convolution: kernel `[*kernel, in, multiplier]`; the outputs of an input are next to one another."""

    @property
    def out_channels(self) -> int:
        """Size of the output's channel axis."""
        return self.in_channels * super().out_channels

    def along_outputs(self, values: Array) -> Array:
        """Return `[in, multiplier]`."""
        return values.reshape(self.in_channels, -1)

    def response(self, values: Array) -> Array:
        """Return the output `[in·multiplier]` for a constant input."""
        kernel = self.kernels[self.first]
        return (kernel * values[:, None]).sum(axis=tuple(range(kernel.ndim - 2))).reshape(-1)


class Separable(Depthwise):
    """A depthwise, then a pointwise convolution: kernels `[*kernel, in, multiplier]` and `[*1, in·multiplier, out]`."""

    first = "depthwise_kernel"
    last = "pointwise_kernel"

    @property
    def out_channels(self) -> int:
        """Size of the output's channel axis."""
        return self.kernels[self.last].shape[-1]

    def along_outputs(self, values: Array) -> Array:
        """Return `[out]`."""
        return values

    def response(self, values: Array) -> Array:
        """Return the output `[out]` for a constant input."""
        pointwise = self.kernels[self.last]
        return super().response(values) @ pointwise.reshape(-1, pointwise.shape[-1])


def _pointwise(layer: Any) -> bool:
    return set(layer.kernel_size) == {1}


_KINDS: dict[Any, type[Linear]] = {
    layers.Dense: Dense,
    **dict.fromkeys((layers.Conv1D, layers.Conv2D, layers.Conv3D), Convolution),
    **dict.fromkeys((layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose), Transposed),
    **dict.fromkeys((layers.DepthwiseConv1D, layers.DepthwiseConv2D), Depthwise),
    **dict.fromkeys((layers.SeparableConv1D, layers.SeparableConv2D), Separable),
}


def is_linear(layer: Any) -> bool:
    """Return whether the layer is of a kind that can absorb a scale and shift."""
    return any(isinstance(layer, kind) for kind in _KINDS)


def read(layer: Any) -> Linear:
    """Return the layer's weights.

    Raises:
        CannotFold: They are not plain weights, or a subclass computes something else.
    """
    name = named(layer)
    base = next(kind for kind in _KINDS if isinstance(layer, kind))
    if has_own_call(layer, base):
        raise CannotFold(f"{name} has a call of its own")
    if getattr(layer, "quantization_mode", None) is not None:
        raise CannotFold(f"the weights of {name} are quantized")
    if getattr(layer, "lora_enabled", False):
        raise CannotFold(f"the weights of {name} are adapted by LoRA")
    kind = _KINDS[base]
    kernels = {attribute: array(getattr(layer, attribute)) for attribute in dict.fromkeys((kind.first, kind.last))}
    return kind(layer, kernels, array(layer.bias) if layer.use_bias else None)
