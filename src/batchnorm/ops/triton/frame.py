"""From the tensors of a call to what kernels take: one memory layout, vectors without gaps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.triton import plan
from batchnorm.ops.triton.plan import Plan


class Frame:
    """x's sizes, and the memory layout in which the kernels see every tensor like x.

    That is x's own where it is contiguous or channels-last, else that of `empty_like(x)` if it is one of these, else
    contiguous, by copies.
    """

    def __init__(self, x: Tensor) -> None:
        self.device, self.dtype, self.shape = x.device, x.dtype, x.shape
        self.n, self.c, self.s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        self.channels_last, self.converted = False, False
        self.x, self.like = x, x  # like: x's sizes in the kernels' layout
        if not x.is_contiguous():
            self.channels_last = _channels_last(x)
            if not self.channels_last:
                self.like = torch.empty_like(x, device="meta")
                self.channels_last = _channels_last(self.like)
                if not self.channels_last:
                    self.converted, self.like = not self.like.is_contiguous(), self.like.contiguous()
        self.processors = plan.multiprocessors(x.device)
        self.settings = plan.settings_of(self.s, self.channels_last, x.dtype.itemsize)

    def read(self, t: Tensor) -> Tensor:
        """A tensor like x, or its copy where its strides or dtype are others."""
        if t.dtype == self.dtype and self._lies_alike(t):
            return t
        return self.result().copy_(t)

    def _lies_alike(self, t: Tensor) -> bool:
        given, wanted = t.stride(), self.like.stride()
        return given == wanted or all(n == 1 or a == b for n, a, b in zip(self.shape, given, wanted, strict=True))

    def read_any(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """`read` of those that are there."""
        return tuple(None if t is None else self.read(t) for t in tensors)

    def result(self) -> Tensor:
        """A result like x, to be written by a kernel."""
        return torch.empty_like(self.like, device=self.device)

    def returned(self, written: Tensor) -> Tensor:
        """What to return of a result: with the strides of `empty_like(x)`."""
        return torch.empty_like(self.x).copy_(written) if self.converted else written

    def vectors(self, number: int, *shape: int) -> tuple[Tensor, ...]:
        """Results in float32, to be written by a kernel."""
        return tuple(torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(number))

    def weights(self, t: Tensor | None) -> Tensor | None:
        """Weights `[N, *S]` in float32 without gaps."""
        return None if t is None else t.to(torch.float32).contiguous()

    def streamed(self, index: Tensor | None = None, *, by_sample: bool = False) -> Plan:
        """The plan for going over tiles; with `by_sample` and an index every sample is a split of its own."""
        indexed = index is not None
        return plan.streamed(
            self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, indexed, indexed and by_sample,
            self.processors, self.settings,
        )  # fmt: skip

    def at_once(self, tensors: int) -> Plan | None:
        """The plan for reading x once, or None."""
        return plan.at_once(
            self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, tensors, self.processors, self.settings
        )


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device, so t's is made that."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def _channels_last(t: Tensor) -> bool:
    return t.movedim(1, -1).is_contiguous()


class Vectors:
    """Statistics and parameters, `[C]` or, with an index, `[K, C]`."""

    def __init__(
        self,
        mean: Tensor,
        mean_low: Tensor | None,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        index: Tensor | None,
    ) -> None:
        statistics, self.stride_statistic = _without_gaps(mean, mean_low, var)
        affine, self.stride_affine = _without_gaps(weight, bias)
        self.pointers = (*statistics, *affine)
        self.index = None if index is None else index.contiguous()
        self.rows = min((t.shape[0] for t in self.pointers if t is not None and t.dim() == 2), default=1)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Rows, and what lies between them."""
        return self.rows, self.stride_statistic, self.stride_affine


def _without_gaps(*vectors: Tensor | None) -> tuple[Sequence[Tensor | None], int]:
    """The vectors, all by row if one is; and elements from row to row, 0 where all samples share one."""
    rows = min((t.shape[0] for t in vectors if t is not None and t.dim() == 2), default=0)
    if rows:
        vectors = tuple(None if t is None else t[:rows] if t.dim() == 2 else t.expand(rows, -1) for t in vectors)
    stride = next((t.shape[-1] for t in vectors if t is not None), 0) if rows else 0
    return [None if t is None else t.contiguous() for t in vectors], stride
