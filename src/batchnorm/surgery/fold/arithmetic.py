"""What folding computes: weights in float64, rounded once at the end (the mathematics page, "Folding, at inference").

Weights come as tensors or arrays and leave as float64 tensors on the CPU. A convolution's weight is
`[out, in / groups, *kernel]`, a transposed one's `[in, out / groups, *kernel]`, a linear layer's `[out, in]` (a kernel
of no dimensions, one group). Scale and shift are `[C]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class NotRepresentable(ValueError):
    """A folded weight is not finite in the dtype that it is to be stored in."""


class Weights(NamedTuple):
    """A linear operation's weight and bias `[out]`, float64."""

    weight: Tensor
    bias: Tensor


def wide(values: Any) -> Tensor:
    """The values in float64 on the CPU, detached; from a tensor, an array or a sequence."""
    return torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64)


def rounded(values: Tensor, like: Tensor) -> Tensor:
    """The values in the dtype, on the device and (where the rank is the same) in the memory format of `like`.

    Raises:
        NotRepresentable: A finite value would become infinite.
    """
    result = values.to(like.dtype)
    if not torch.equal(torch.isfinite(result), torch.isfinite(values)):
        raise NotRepresentable(
            f"folded weights must be finite in {like.dtype}, got {values.abs().max():.3g}, which is beyond its range."
        )
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if channels_last is not None and values.dim() == like.dim() and not like.is_contiguous():
        result = result.contiguous(memory_format=channels_last)
    return result.to(like.device)


@dataclass(frozen=True)
class ScaleShift:
    """`y = scale·x + shift`, per channel: what batch normalization is in evaluation.

    Attributes:
        scale: s, float64; `[C]`, or of any shape that broadcasts against x.
        shift: t, of the same shape.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(
        cls, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> ScaleShift:
        """`s = γ/√(running_var + eps)`, `t = β - running_mean·s`; None stands for γ = 1 and β = 0."""
        variance = wide(running_var)
        scale = (torch.ones_like(variance) if weight is None else wide(weight)) / torch.sqrt(variance + eps)
        shift = (torch.zeros_like(variance) if bias is None else wide(bias)) - wide(running_mean) * scale
        return cls(scale, shift)

    def then(self, outer: ScaleShift) -> ScaleShift:
        """This one, and `outer` after it."""
        return ScaleShift(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    def split(self, sizes: Sequence[int], axis: int = 0) -> list[ScaleShift]:
        """The parts that belong to the inputs of a concatenation along `axis`."""
        parts = zip(self.scale.split(list(sizes), axis), self.shift.split(list(sizes), axis), strict=True)
        return [ScaleShift(*part) for part in parts]

    @property
    def shifts(self) -> bool:
        """Whether any shift is not zero."""
        return bool((self.shift != 0).any())


def into_producer(
    weight: Any, bias: Any, scale_shift: ScaleShift, *, groups: int = 1, transposed: bool = False
) -> Weights:
    """The operation, and the scale and shift after it: `W′ = s·W` along the output channels, `b′ = s·b + t`."""
    w, s = wide(weight), scale_shift.scale
    if transposed:  # [in, out / groups, *kernel]: the inputs of each group have their own outputs
        per_input = s.reshape(groups, 1, -1).expand(groups, w.shape[0] // groups, -1).reshape(w.shape[0], -1)
        w = w * per_input.reshape(*w.shape[:2], *(1,) * (w.dim() - 2))
    else:
        w = w * s.reshape(-1, *(1,) * (w.dim() - 1))
    return Weights(w, scale_shift.shift if bias is None else s * wide(bias) + scale_shift.shift)


def into_consumer(
    weight: Any, scale_shift: ScaleShift, *, groups: int = 1, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """The weight with the scale and shift before it, and the kernel that makes of a plane of ones what the shift adds.

    `W′ = W·s` along the input channels. Where every output sees the whole kernel, the shift adds the kernel's sum to
    the bias. Where zeros are padded *after* the shift, and in a transposed convolution, it adds what the operation with
    this kernel, one input channel, `groups = 1` and the same stride, padding and dilation makes of ones: less at the
    border.

    Returns:
        W′ of the weight's shape; the kernel `[out, 1, *kernel]`, for a transposed convolution `[1, out, *kernel]`.
    """
    w, (s, t) = wide(weight), (scale_shift.scale, scale_shift.shift)
    ones = (1,) * (w.dim() - 2)
    if transposed:
        along = (-1, 1, *ones)
        kernel = (w * t.reshape(along)).unflatten(0, (groups, -1)).sum(1)  # [groups, out / groups, *kernel]
        return w * s.reshape(along), kernel.flatten(0, 1).unsqueeze(0)
    inputs = w.shape[1]

    def per_output(values: Tensor) -> Tensor:
        of_group = values.reshape(groups, 1, inputs).expand(groups, w.shape[0] // groups, inputs)
        return of_group.reshape(w.shape[0], inputs, *ones)

    return w * per_output(s), (w * per_output(t)).sum(1, keepdim=True)


def interior(kernel: Tensor) -> Tensor:
    """What the shift adds to the bias `[out]` where every output sees the whole of `into_consumer`'s kernel."""
    return kernel.flatten(1).sum(1)


def as_kernel(scale: Tensor, *, groups: int, dims: int) -> Tensor:
    """The scale as the weight `[C, C / groups, 1, ...]` of a convolution with `dims` spatial dimensions."""
    channels = scale.numel()
    weight = torch.zeros(channels, channels // groups, dtype=torch.float64)
    each = torch.arange(channels)
    weight[each, each % (channels // groups)] = scale
    return weight.reshape(channels, -1, *(1,) * dims)


def embedded(weight: Any, kernel: Sequence[int], offset: Sequence[int], step: Sequence[int]) -> Tensor:
    """The weight in a larger kernel: its tap j at `offset + step·j` along each dimension, zeros elsewhere."""
    w = wide(weight)
    result = torch.zeros(*w.shape[:2], *kernel, dtype=torch.float64)
    taps = [
        slice(first, first + by * (size - 1) + 1, by) for first, by, size in zip(offset, step, w.shape[2:], strict=True)
    ]
    where: tuple[Any, ...] = (..., *taps)
    result[where] = w
    return result


def regrouped(weight: Any, *, groups: int, into: int) -> Tensor:
    """The weight of `groups` groups as one of fewer, larger groups, zeros where nothing was connected."""
    w = wide(weight)
    if groups == into:
        return w
    each = groups // into  # groups that become one
    w = w.unflatten(0, (into, each, -1))  # [into, each, out, in, *kernel]
    size = w.shape[3]
    blocks = [F.pad(w[:, i], (*(0, 0) * (w.dim() - 4), i * size, (each - 1 - i) * size)) for i in range(each)]
    return torch.stack(blocks, 1).flatten(0, 2)
