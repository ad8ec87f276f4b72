"""Sums whose bits do not depend on the number of threads.

`torch.sum` splits one output's values among threads when it is alone, and picks its order of summation by where
an output falls in a thread's share. Both are avoided by giving it only rows that one thread sums in one order, or
so little that it uses one thread; what is larger is halved by elementwise additions first.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch parallelizes from 32,768 elements on; below, one thread sums in a fixed order.
_SERIAL = 16_384


def fold(t: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, pairwise until what is left is summed by one thread."""
    while t.numel() > _SERIAL and t.shape[dim] > 1:
        half = t.shape[dim] // 2
        low, high, odd = (
            t.narrow(dim, 0, half),
            t.narrow(dim, half, half),
            t.narrow(dim, 2 * half, t.shape[dim] % 2),
        )
        t = low + high
        if odd.shape[dim]:
            t = torch.cat((t, odd), dim)
    return t.sum(dim)


def sum_positions(t: Tensor) -> Tensor:
    """Sum `t [N, C, *S]` over its positions: `[N, C]`."""
    if t.dim() == 2:
        return t
    t = t.flatten(2)
    if t.stride(2) != 1:  # channels innermost: a sum of rows, not within rows
        return fold(t, 2)
    while t.shape[2] > _SERIAL:
        blocks = t.shape[2] // _SERIAL
        whole, rest = t.narrow(2, 0, blocks * _SERIAL), t.narrow(2, blocks * _SERIAL, t.shape[2] % _SERIAL)
        t = torch.cat((whole.unflatten(2, (blocks, _SERIAL)).sum(3), rest.sum(2, keepdim=True)), 2)
    return t.sum(2)
