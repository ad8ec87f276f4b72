"""The arithmetic of folding, in float64 (the tutorial, "Fusing into a convolution").

Weights are given as tensors or arrays and returned as float64 tensors on the CPU. A convolution's weight is
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
    """A folded weight is not finite in the dtype in which it is stored."""


class Weights(NamedTuple):
    """The weight and the bias `[out]` of a linear operation, float64."""

    weight: Tensor
    bias: Tensor


def wide(values: Any) -> Tensor:
    """Return a tensor, array or sequence as a detached float64 tensor on the CPU."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def rounded(values: Tensor, like: Tensor) -> Tensor:
    """Return the values with the dtype, the device and, if the rank is the same, the memory format of `like`.

    Raises:
        NotRepresentable: A finite value would become infinite.
    """
    result = values.to(like.dtype)
    finite = not result.numel() or bool(torch.stack(torch.aminmax(result)).isfinite().all())  # the fastest way
    if not finite and not torch.equal(torch.isfinite(result), torch.isfinite(values)):
        raise NotRepresentable(
            f"folded weights must be finite in {like.dtype}, got {values.abs().max():.3g}, which is beyond its range."
        )
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(like.dim())
    if channels_last is not None and values.dim() == like.dim() and not like.is_contiguous():
        result = result.contiguous(memory_format=channels_last)
    return result.to(like.device)


@dataclass(frozen=True)
class ScaleShift:
    """`y = scale·x + shift`, per channel: batch normalization in evaluation.

    Attributes:
        scale: s, float64, `[C]` or of any shape that broadcasts against x.
        shift: t, of the same shape.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(
        cls, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> ScaleShift:
        """Return `s = γ/√(running_var + eps)` and `t = β - running_mean·s`; None means γ = 1 or β = 0."""
        variance = wide(running_var)
        scale = (torch.ones_like(variance) if weight is None else wide(weight)) / torch.sqrt(variance + eps)
        shift = (torch.zeros_like(variance) if bias is None else wide(bias)) - wide(running_mean) * scale
        return cls(scale, shift)

    def then(self, outer: ScaleShift) -> ScaleShift:
        """Return this scale and shift followed by `outer`."""
        return ScaleShift(outer.scale * self.scale, outer.scale * self.shift + outer.shift)

    def split(self, sizes: Sequence[int], axis: int = 0) -> list[ScaleShift]:
        """Return the parts that belong to the inputs of a concatenation along `axis`."""
        parts = zip(self.scale.split(list(sizes), axis), self.shift.split(list(sizes), axis), strict=True)
        return [ScaleShift(*part) for part in parts]

    @property
    def shifts(self) -> bool:
        """Whether any shift is not zero."""
        return bool((self.shift != 0).any())


def into_producer(
    weight: Any, bias: Any, scale_shift: ScaleShift, *, groups: int = 1, transposed: bool = False
) -> Weights:
    """Return the operation followed by the scale and shift: `W′ = s·W` along the output channels, `b′ = s·b + t`."""
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
    """Return the weight of the operation preceded by the scale and shift, and the kernel of the shift.

    `W′ = W·s` along the input channels. If every output sees the whole kernel, the shift adds the kernel's sum to the
    bias. If zeros are padded *after* the shift, or if the convolution is transposed, the shift adds less near the
    border: the result of the operation with this kernel, one input channel, `groups = 1` and the same stride, padding
    and dilation, applied to ones.

    Returns:
        W′ in the weight's shape; the kernel `[out, 1, *kernel]`, or `[1, out, *kernel]` if transposed.
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
    """Return the shift's contribution to the bias `[out]` if every output sees the whole kernel of the shift."""
    return kernel.flatten(1).sum(1)


def as_kernel(scale: Tensor, *, groups: int, dims: int) -> Tensor:
    """Return the scale as the weight `[C, C / groups, 1, ...]` of a convolution with `dims` spatial dimensions."""
    channels = scale.numel()
    weight = torch.zeros(channels, channels // groups, dtype=torch.float64, device="cpu")
    each = torch.arange(channels, device="cpu")
    weight[each, each % (channels // groups)] = scale
    return weight.reshape(channels, -1, *(1,) * dims)


def embedded(weight: Any, kernel: Sequence[int], offset: Sequence[int], step: Sequence[int]) -> Tensor:
    """Return the weight in a larger kernel: its tap j at `offset + step·j` along each dimension, zeros elsewhere."""
    w = wide(weight)
    result = torch.zeros(*w.shape[:2], *kernel, dtype=torch.float64, device="cpu")
    taps = [
        slice(first, first + by * (size - 1) + 1, by) for first, by, size in zip(offset, step, w.shape[2:], strict=True)
    ]
    where: tuple[Any, ...] = (..., *taps)
    result[where] = w
    return result


def regrouped(weight: Any, *, groups: int, into: int) -> Tensor:
    """Return a weight of `groups` groups as one of fewer, larger groups, with zeros for new connections."""
    w = wide(weight)
    if groups == into:
        return w
    each = groups // into  # groups that become one
    w = w.unflatten(0, (into, each, -1))  # [into, each, out, in, *kernel]
    size = w.shape[3]
    blocks = [F.pad(w[:, i], (*(0, 0) * (w.dim() - 4), i * size, (each - 1 - i) * size)) for i in range(each)]
    return torch.stack(blocks, 1).flatten(0, 2)
