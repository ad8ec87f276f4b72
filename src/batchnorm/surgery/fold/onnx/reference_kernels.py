"""Kernels for ONNX's reference implementation. Its own are too slow for a whole network, or wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_average_pool import AveragePool_19 as SlowAveragePool
from onnx.reference.ops.op_batch_normalization import BatchNormalization_14
from onnx.reference.ops.op_conv_transpose import ConvTranspose as SlowConvTranspose
from onnx.reference.ops.op_max_pool import MaxPool as SlowMaxPool
from torch import Tensor
from torch.nn import functional as F

from batchnorm.surgery.fold.onnx.graph import Array, every_node

# Operators that the reference computes by loops over every number, in Python.
_SLOW = {
    "Resize", "Upsample", "GridSample", "RoiAlign", "DeformConv", "LpPool", "MaxUnpool", "Col2Im", "NonMaxSuppression",
    "MaxRoiPool", "TfIdfVectorizer", "STFT", "DFT",
}  # fmt: skip
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def fast(model: onnx.ModelProto) -> bool:
    """Whether the reference runs the model in reasonable time."""
    return all(node.op_type not in _SLOW for node in every_node(model))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).astype(array.dtype, copy=True))


def _padding(size: torch.Size, kernel: list[int], steps: list[int], strides: list[int], upper: bool) -> list[int]:
    """Return the `pads` of SAME_UPPER and SAME_LOWER."""
    firsts, lasts = [], []
    for n, taps, step, stride in zip(size, kernel, steps, strides, strict=True):
        total = max((-(-n // stride) - 1) * stride + step * (taps - 1) + 1 - n, 0)
        small, large = total // 2, total - total // 2
        firsts.append(small if upper else large)
        lasts.append(large if upper else small)
    return firsts + lasts


def _for_pad(pads: list[int]) -> list[int]:
    """Return paddings in ONNX's order in the order of `F.pad`."""
    dims = len(pads) // 2
    return [pads[axis + end * dims] for axis in reversed(range(dims)) for end in (0, 1)]


class Conv(OpRun):
    """Convolution by PyTorch."""

    op_domain = ""

    def _run(
        self, X: Array, W: Array, B: Array | None = None, auto_pad: Any = None, dilations: Any = None,
        group: Any = None, kernel_shape: Any = None, pads: Any = None, strides: Any = None,
    ) -> tuple[Array]:  # fmt: skip
        x, w = _tensor(X), _tensor(W)
        dims = w.dim() - 2
        steps, strides = list(dilations or [1] * dims), list(strides or [1] * dims)
        pads = list(pads or [0] * 2 * dims)
        if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            pads = _padding(x.shape[2:], list(w.shape[2:]), steps, strides, auto_pad == "SAME_UPPER")
        elif auto_pad == "VALID":
            pads = [0] * 2 * dims
        bias = None if B is None else _tensor(B)
        return (_CONVOLUTIONS[dims](F.pad(x, _for_pad(pads)), w, bias, strides, 0, steps, group or 1).numpy(),)


class ConvTranspose(SlowConvTranspose):
    """Transposed convolution by PyTorch, if the padding is given."""

    op_domain = ""

    def _run(
        self, X: Array, W: Array, B: Array | None = None, auto_pad: Any = None, dilations: Any = None,
        group: Any = None, kernel_shape: Any = None, output_padding: Any = None, output_shape: Any = None,
        pads: Any = None, strides: Any = None,
    ) -> tuple[Array]:  # fmt: skip
        dims = W.ndim - 2
        if output_shape or auto_pad not in (None, "NOTSET"):
            return super()._run(
                X, W, B, auto_pad, dilations, group, kernel_shape, output_padding, output_shape, pads, strides
            )
        pads, more = list(pads or [0] * 2 * dims), output_padding or [0] * dims
        y = _TRANSPOSED[dims](_tensor(X), _tensor(W), None, strides or 1, 0, 0, group or 1, dilations or 1)
        # Crop here: PyTorch pads both ends by the same amount.
        last = [m - p for m, p in zip(more, pads[dims:], strict=True)]
        y = F.pad(y, _for_pad([*(-p for p in pads[:dims]), *last]))
        return ((y if B is None else y + _tensor(B).reshape(-1, *(1,) * dims)).numpy(),)


def _simple(kernel_shape: Any, auto_pad: Any, ceil_mode: Any, pads: Any, dilations: Any) -> bool:
    """Whether PyTorch's pooling computes the same."""
    dims = len(kernel_shape)
    pads = list(pads or [0] * 2 * dims)
    return (
        dims in _MAX_POOLS
        and auto_pad in (None, "NOTSET", "VALID")
        and not ceil_mode
        and pads[:dims] == pads[dims:]
        and all(p <= k // 2 for p, k in zip(pads, kernel_shape, strict=False))
        and set(dilations or [1]) == {1}
    )


class MaxPool(SlowMaxPool):
    """Max-pooling by PyTorch, if it computes the same."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x: Array, auto_pad: Any = None, ceil_mode: Any = None, dilations: Any = None, kernel_shape: Any = None,
        pads: Any = None, storage_order: Any = None, strides: Any = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        dims = len(kernel_shape)
        if len(self.output) > 1 or not _simple(kernel_shape, auto_pad, ceil_mode, pads, dilations):
            return super()._run(x, auto_pad, ceil_mode, dilations, kernel_shape, pads, storage_order, strides)
        padding = list(pads or [0] * dims)[:dims]
        return (_MAX_POOLS[dims](_tensor(x), list(kernel_shape), list(strides or [1] * dims), padding).numpy(),)


class AveragePool(SlowAveragePool):
    """Average-pooling by PyTorch, if it computes the same."""

    op_domain = ""

    def _run(  # type: ignore[override]
        self, x: Array, auto_pad: Any = None, ceil_mode: Any = None, dilations: Any = None, kernel_shape: Any = None,
        pads: Any = None, strides: Any = None, count_include_pad: Any = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        dims = len(kernel_shape)
        if not _simple(kernel_shape, auto_pad, ceil_mode, pads, dilations):
            return super()._run(x, auto_pad, ceil_mode, dilations, kernel_shape, pads, strides, count_include_pad)
        padding = list(pads or [0] * dims)[:dims]
        y = _AVERAGE_POOLS[dims](
            _tensor(x), list(kernel_shape), list(strides or [1] * dims), padding, False, bool(count_include_pad)
        )
        return (y.numpy(),)


class BatchNormalization(BatchNormalization_14):
    """Batch normalization in evaluation. The reference takes some older versions of it for training."""

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, var: Array, epsilon: Any = None, momentum: Any = None,
        training_mode: Any = None,
    ) -> tuple[Array, ...]:  # fmt: skip
        if training_mode:
            return super()._run(x, scale, bias, mean, var, epsilon, momentum, training_mode)
        along = (-1, *(1,) * (x.ndim - 2))
        s, b, m, v = (t.reshape(along) for t in (scale, bias, mean, var))
        return ((s * (x - m) / np.sqrt(v + epsilon) + b).astype(x.dtype),)


FAST = [BatchNormalization, Conv, ConvTranspose, MaxPool, AveragePool]
