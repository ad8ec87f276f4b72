"""Convert the tensors of a call to arguments of kernels: one memory layout, contiguous vectors."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.ops.schemas import Vectors
from batchnorm.ops.triton import tiling
from batchnorm.ops.triton.settings import Settings
from batchnorm.ops.triton.tiling import Tiling


class Frame:
    """The sizes of x, and the memory layout of every tensor of x's shape in the kernels.

    This is x's layout if it is contiguous or channels-last. Otherwise, it is the layout of `empty_like(x)`, or
    contiguous if that is neither. Tensors with another layout are copied. A frame holds no values and is kept for later
    tensors like x.
    """

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.device, self.dtype, self.shape = device, dtype, shape
        self.n, self.c, self.s = shape[0], shape[1], math.prod(shape[2:])
        self.m = float(self.n * self.s)
        x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        like = x if x.is_contiguous() or _channels_last(x) else torch.empty_like(x)
        self.channels_last = not like.is_contiguous() and _channels_last(like)
        self.settings = self._settings()
        self._returned = torch.empty_like(x).stride()
        self._converted = not (self.channels_last or like.is_contiguous())
        self._strides = torch.empty_like(like.contiguous() if self._converted else like).stride()
        self._values, self._vectors = (torch.empty(0, dtype=d, device=device) for d in (dtype, torch.float32))
        self._tilings: dict[tuple[int, str, bool | int], Tiling | None] = {}

    @staticmethod
    def of(x: Tensor) -> Frame:
        """Return the frame of x."""
        frame = _frame(x.shape, x.stride(), x.dtype, x.device)
        if not frame.is_current():
            forget()
            frame = _frame(x.shape, x.stride(), x.dtype, x.device)
        return frame

    def is_current(self) -> bool:
        """Return whether the settings are still those of the table, which tuning changes."""
        return self.settings is self._settings()

    def _settings(self) -> Settings:
        return tiling.settings_of(self.s, self.channels_last, self.dtype.itemsize)

    def read(self, t: Tensor) -> Tensor:
        """Return a tensor of x's shape, or a copy if its strides or dtype differ."""
        if t.dtype == self.dtype and (t.stride() == self._strides or self._has_strides(t)):
            return t
        return self.result().copy_(t)

    def _has_strides(self, t: Tensor) -> bool:
        return all(n == 1 or a == b for n, a, b in zip(self.shape, t.stride(), self._strides, strict=True))

    def read_if(self, t: Tensor | None) -> Tensor | None:
        """Return `read(t)`, or None for None."""
        return None if t is None else self.read(t)

    def result(self) -> Tensor:
        """Allocate a result of x's shape for a kernel to write."""
        return self._values.new_empty_strided(self.shape, self._strides)

    def returned(self, written: Tensor) -> Tensor:
        """Return a written result with the strides of `empty_like(x)`."""
        if not self._converted:
            return written
        return self._values.new_empty_strided(self.shape, self._returned).copy_(written)

    def vectors(self, number: int, *shape: int) -> list[Tensor]:
        """Allocate float32 results for a kernel to write."""
        new = self._vectors.new_empty
        return [new(*shape) for _ in range(number)]

    def row_vectors(self, number: int, index: Tensor | None = None, groups: int = 1) -> list[Tensor]:
        """Allocate `[C]` results, or `[groups, C]` with an index."""
        return self.vectors(number, self.c) if index is None else self.vectors(number, groups, self.c)

    def streamed(self, index: Tensor | None = None, *, by_sample: bool = False) -> Tiling:
        """Return the tiling for programs that loop over tiles.

        With `by_sample` and an index, every sample is a separate split.
        """
        indexed = index is not None
        by_sample = indexed and by_sample
        processors = tiling.multiprocessors(self.device)
        key = (processors, "streamed by sample" if by_sample else "streamed", indexed)
        found = self._tilings.get(key)
        if found is None:
            found = self._tilings[key] = tiling.streamed(
                self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, indexed, by_sample,
                processors, self.settings,
            )  # fmt: skip
        return found

    def at_once(self, tensors: int) -> Tiling | None:
        """Return the tiling for programs that read x once, or None if there is none."""
        processors = tiling.multiprocessors(self.device)
        key = (processors, "at once", tensors)
        if key not in self._tilings:
            self._tilings[key] = tiling.at_once(
                self.n, self.c, self.s, self.channels_last, self.dtype.itemsize, tensors,
                processors, self.settings,
            )  # fmt: skip
        return self._tilings[key]


@functools.lru_cache(maxsize=4096)
def _frame(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Frame:
    return Frame(shape, strides, dtype, device)


def forget() -> None:
    """Forget all frames, tilings and launches, after a change of the settings."""
    _frame.cache_clear()
    tiling.forget()


_ALREADY = contextlib.nullcontext()


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make t's device the current one, because kernels start on the current device."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(t.device)


def _channels_last(t: Tensor) -> bool:
    return t.movedim(1, -1).is_contiguous()


# The sizes below if no sample has an index.
BY_CHANNEL = (1, 0, 0)


class KernelVectors(NamedTuple):
    """Statistics and parameters as arguments of kernels: `[C]` or, with an index, `[K, C]`."""

    tensors: tuple[Tensor | None, ...]
    index: Tensor | None  # type: ignore[assignment]  # a tuple's method of this name is not needed
    sizes: tuple[int, int, int]  # the number of rows, and the strides between rows of statistics and of parameters

    @classmethod
    def of(cls, vectors: Vectors, index: Tensor | None) -> KernelVectors:
        """Return the vectors, copied if they have gaps."""
        if index is None:
            return cls(tuple([None if t is None else t.contiguous() for t in vectors]), None, BY_CHANNEL)
        statistics, stride_statistic = _without_gaps(*vectors[:3])
        affine, stride_affine = _without_gaps(*vectors[3:])
        tensors = (*statistics, *affine)
        rows = min((t.shape[0] for t in tensors if t is not None and t.dim() == 2), default=1)
        return cls(tensors, index.contiguous(), (rows, stride_statistic, stride_affine))


def _without_gaps(*vectors: Tensor | None) -> tuple[Sequence[Tensor | None], int]:
    """Return the vectors, all as `[K, C]` if one is, and the stride between rows, which is 0 for `[C]`."""
    rows = min((t.shape[0] for t in vectors if t is not None and t.dim() == 2), default=0)
    if rows:
        vectors = tuple(None if t is None else t[:rows] if t.dim() == 2 else t.expand(rows, -1) for t in vectors)
    stride = next((t.shape[-1] for t in vectors if t is not None), 0) if rows else 0
    return [None if t is None else t.contiguous() for t in vectors], stride


def kernel_weights(t: Tensor | None) -> Tensor | None:
    """Return weights `[N, *S]` as contiguous float32."""
    return None if t is None else t.to(torch.float32).contiguous()
