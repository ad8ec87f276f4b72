"""Sums whose bits do not depend on the number of threads.

`torch.sum` splits the values of a single output among threads, and otherwise its order of summation depends on where
an output falls in a thread's share. These functions avoid both: they give it only rows that one thread sums in one
order, or so few values that it uses one thread, and first halve larger tensors by elementwise additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch uses several threads from 32,768 elements on; below, one thread sums in a fixed order.
_SERIAL = 16_384


def sum_pairwise(t: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, pairwise until one thread can sum the rest."""
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
        return sum_pairwise(t, 2)
    while t.shape[2] > _SERIAL:
        blocks = t.shape[2] // _SERIAL
        whole, rest = t.narrow(2, 0, blocks * _SERIAL), t.narrow(2, blocks * _SERIAL, t.shape[2] % _SERIAL)
        t = torch.cat((whole.unflatten(2, (blocks, _SERIAL)).sum(3), rest.sum(2, keepdim=True)), 2)
    return t.sum(2)
