"""Sums whose bits do not depend on the number of threads.

`torch.sum` splits the values of a single output among threads. For several outputs, its order of summation depends on
the position of an output in a thread's share. These functions avoid both problems. They halve large tensors by
elementwise additions, and call `torch.sum` only for few values, or for rows that one thread sums in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

# torch uses several threads for 32,768 or more elements. For fewer, one thread computes in a fixed order.
SERIAL = 16_384


def sum_pairwise(t: Tensor, dim: int) -> Tensor:
    """Sum over `dim`, pairwise until one thread can sum the rest."""
    while t.numel() > SERIAL and t.shape[dim] > 1:
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
    if t.stride(2) != 1:  # channels are innermost, so this adds whole vectors of channels
        return sum_pairwise(t, 2)
    while t.shape[2] > SERIAL:
        blocks = t.shape[2] // SERIAL
        whole, rest = t.narrow(2, 0, blocks * SERIAL), t.narrow(2, blocks * SERIAL, t.shape[2] % SERIAL)
        t = torch.cat((whole.unflatten(2, (blocks, SERIAL)).sum(3), rest.sum(2, keepdim=True)), 2)
    return t.sum(2)
