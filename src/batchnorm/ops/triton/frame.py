"""Convert the tensors of a call to arguments of kernels: one memory layout, contiguous vectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops.schemas import Vectors
from batchnorm.ops.triton import tiling
from batchnorm.ops.triton.tiling import Tiling


class Frame:
    """x's sizes, and the memory layout of every tensor of x's shape in the kernels.

    This is x's layout if it is contiguous or channels-last. Otherwise, it is the layout of `empty_like(x)`, or
    contiguous if that is neither. Tensors with another layout are copied.
    """

    def __init__(self, x: Tensor) -> None:
        self.device, self.dtype, self.shape = x.device, x.dtype, x.shape
        self.n, self.c, self.s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        self.channels_last, self.converted = False, False
        self.x, self.like = x, x  # like: a tensor with x's sizes in the kernels' layout
        if not x.is_contiguous():
            self.channels_last = _channels_last(x)
            if not self.channels_last:
                self.like = torch.empty_like(x, device="meta")
                self.channels_last = _channels_last(self.like)
                if not self.channels_last:
                    self.converted, self.like = not self.like.is_contiguous(), self.like.contiguous()
        self.m = float(self.n * self.s)
        self.processors = tiling.multiprocessors(x.device)
        self.settings = tiling.settings_of(self.s, self.channels_last, x.dtype.itemsize)

    def read(self, t: Tensor) -> Tensor:
        """Return a tensor of x's shape, or a copy if its strides or dtype differ."""
        if t.dtype == self.dtype and self._has_strides(t):
            return t
        return self.result().copy_(t)

    def _has_strides(self, t: Tensor) -> bool:
        given, wanted = t.stride(), self.like.stride()
        return given == wanted or all(n == 1 or a == b for n, a, b in zip(self.shape, given, wanted, strict=True))

    def read_any(self, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return `read` of each tensor, None for None."""
        return tuple(None if t is None else self.read(t) for t in tensors)

    def result(self) -> Tensor:
        """Allocate a result of x's shape for a kernel to write."""
        return torch.empty_like(self.like, device=self.device)

    def returned(self, written: Tensor) -> Tensor:
        """Return a written result with the strides of `empty_like(x)`."""
        return torch.empty_like(self.x).copy_(written) if self.converted else written

    def vectors(self, number: int, *shape: int) -> tuple[Tensor, ...]:
        """Allocate float32 results for a kernel to write."""
        return tuple(torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(number))

    def row_vectors(self, number: int, index: Tensor | None = None, groups: int = 1) -> tuple[Tensor, ...]:
        """Allocate `[C]` results, or `[groups, C]` with an index."""
        return self.vectors(number, *(() if index is None else (groups,)), self.c)

    def weights(self, t: Tensor | None) -> Tensor | None:
        """Return weights `[N, *S]` as contiguous float32."""
        return None if t is None else t.to(torch.float32).contiguous()

    def streamed(self, index: Tensor | None = None, *, by_sample: bool = False) -> Tiling:
        """Return the tiling for programs that loop over tiles.

        With `by_sample` and an index, every sample is a separate split.
        """
        indexed = index is not None
        return tiling.streamed(
            self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, indexed, indexed and by_sample,
            self.processors, self.settings,
        )  # fmt: skip

    def at_once(self, tensors: int) -> Tiling | None:
        """Return the tiling for programs that read x once, or None if there is none."""
        return tiling.at_once(
            self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, tensors, self.processors, self.settings
        )


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make t's device the current one, because kernels start on the current device."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else contextlib.nullcontext()


def _channels_last(t: Tensor) -> bool:
    return t.movedim(1, -1).is_contiguous()


class KernelVectors:
    """Statistics and parameters as arguments of kernels: `[C]` or, with an index, `[K, C]`."""

    def __init__(self, vectors: Vectors, index: Tensor | None) -> None:
        statistics, self.stride_statistic = _without_gaps(*vectors[:3])
        affine, self.stride_affine = _without_gaps(*vectors[3:])
        self.pointers = (*statistics, *affine)
        self.index = None if index is None else index.contiguous()
        self.rows = min((t.shape[0] for t in self.pointers if t is not None and t.dim() == 2), default=1)

    @property
    def rows_and_strides(self) -> tuple[int, int, int]:
        """Return the number of rows, and the strides between rows of statistics and of parameters."""
        return self.rows, self.stride_statistic, self.stride_affine


def _without_gaps(*vectors: Tensor | None) -> tuple[Sequence[Tensor | None], int]:
    """Return the vectors, all as `[K, C]` if one is, and the stride between rows, which is 0 for `[C]`."""
    rows = min((t.shape[0] for t in vectors if t is not None and t.dim() == 2), default=0)
    if rows:
        vectors = tuple(None if t is None else t[:rows] if t.dim() == 2 else t.expand(rows, -1) for t in vectors)
    stride = next((t.shape[-1] for t in vectors if t is not None), 0) if rows else 0
    return [None if t is None else t.contiguous() for t in vectors], stride
