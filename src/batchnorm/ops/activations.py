"""The activations that an operator can apply after normalization, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten

# torch runs fewer elements than 32,768 on one thread.
_SERIAL = 16_384


def _in_blocks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """An elementwise function whose bits do not depend on the number of CPU threads.

    torch's exp and erf round differently at the end of a thread's share than inside it, so every share is made one of
    fixed blocks. Functions of +, ×, max and comparison alone need this not.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return function(*tensors)  # a graph for every size, or for export
    if tensors[0].numel() <= _SERIAL or tensors[0].device.type != "cpu":
        return function(*tensors)
    blocks = zip(*(t.flatten().split(_SERIAL) for t in tensors), strict=True)
    return torch.cat([function(*block) for block in blocks]).reshape(tensors[0].shape)


class Activation(NamedTuple):
    """`y = forward(z, negative_slope)` and `dz = backward(dy, t, negative_slope)`.

    `t` is z, or y where `from_output` says that y tells the derivative as well (for a positive slope).
    The derivative is torch's own, so that gradients agree with it at every kink too.
    """

    forward: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    from_output: bool


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda z, _: z, lambda dy, t, _: dy, True),
    "relu": Activation(lambda z, _: F.relu(z), lambda dy, t, _: _aten.threshold_backward(dy, t, 0.0), True),
    "relu6": Activation(lambda z, _: F.relu6(z), lambda dy, t, _: _aten.hardtanh_backward(dy, t, 0.0, 6.0), True),
    "leaky_relu": Activation(
        lambda z, slope: F.leaky_relu(z, slope),
        # False: t stands for z. For slope > 0 y has z's sign, and the two agree.
        lambda dy, t, slope: _aten.leaky_relu_backward(dy, t, slope, False),
        True,
    ),
    "silu": Activation(
        lambda z, _: _in_blocks(F.silu, z), lambda dy, t, _: _in_blocks(_aten.silu_backward, dy, t), False
    ),
    "gelu": Activation(
        lambda z, _: _in_blocks(F.gelu, z), lambda dy, t, _: _in_blocks(_aten.gelu_backward, dy, t), False
    ),
    "hardswish": Activation(lambda z, _: F.hardswish(z), lambda dy, t, _: _aten.hardswish_backward(dy, t), False),
}


def known_from_output(activation: str, negative_slope: float) -> bool:
    """Whether the derivative can be had from y, so that a residual need not be kept for backward."""
    return ACTIVATIONS[activation].from_output and (activation != "leaky_relu" or negative_slope > 0.0)
