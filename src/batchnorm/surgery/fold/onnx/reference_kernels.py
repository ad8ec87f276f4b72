"""Kernels for ONNX's reference implementation. Its own are too slow for a whole network, or wrong."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Return whether the reference runs the model in reasonable time."""
    return all(node.op_type not in _SLOW for node in every_node(model))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array).astype(array.dtype, copy=True))


def _padding(
    size: Sequence[int], kernel: Sequence[int], steps: list[int], strides: list[int], upper: bool
) -> list[int]:
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

    def _run(self, x: Array, w: Array, b: Array | None = None, **given: Any) -> tuple[Array]:
        dims = w.ndim - 2
        steps, strides = list(given["dilations"] or [1] * dims), list(given["strides"] or [1] * dims)
        pads, auto = list(given["pads"] or [0] * 2 * dims), given["auto_pad"]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            pads = _padding(x.shape[2:], w.shape[2:], steps, strides, auto == "SAME_UPPER")
        elif auto == "VALID":
            pads = [0] * 2 * dims
        bias = None if b is None else _tensor(b)
        padded = F.pad(_tensor(x), _for_pad(pads))
        return (_CONVOLUTIONS[dims](padded, _tensor(w), bias, strides, 0, steps, given["group"] or 1).numpy(),)


class ConvTranspose(SlowConvTranspose):
    """Transposed convolution by PyTorch, if the padding is given."""

    op_domain = ""

    def _run(self, x: Array, w: Array, b: Array | None = None, **given: Any) -> tuple[Array]:  # type: ignore[override]
        dims = w.ndim - 2
        if given["output_shape"] or given["auto_pad"] not in (None, "NOTSET"):
            return super()._run(x, w, b, **given)
        pads, more = list(given["pads"] or [0] * 2 * dims), given["output_padding"] or [0] * dims
        strides, steps, groups = given["strides"] or 1, given["dilations"] or 1, given["group"] or 1
        y = _TRANSPOSED[dims](_tensor(x), _tensor(w), None, strides, 0, 0, groups, steps)
        # Crop here: PyTorch pads both ends by the same amount.
        last = [m - p for m, p in zip(more, pads[dims:], strict=True)]
        y = F.pad(y, _for_pad([*(-p for p in pads[:dims]), *last]))
        return ((y if b is None else y + _tensor(b).reshape(-1, *(1,) * dims)).numpy(),)


def _pooling(given: dict[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
    """Return kernel, stride and padding for PyTorch's pooling; None if that computes something else."""
    kernel = list(given["kernel_shape"])
    dims = len(kernel)
    pads = list(given["pads"] or [0] * 2 * dims)
    same = (
        dims in _MAX_POOLS
        and given["auto_pad"] in (None, "NOTSET", "VALID")
        and not given["ceil_mode"]
        and pads[:dims] == pads[dims:]
        and all(p <= k // 2 for p, k in zip(pads, kernel, strict=False))
        and set(given["dilations"] or [1]) == {1}
    )
    return (kernel, list(given["strides"] or [1] * dims), pads[:dims]) if same else None


class MaxPool(SlowMaxPool):
    """Max-pooling by PyTorch, if it computes the same."""

    op_domain = ""

    def _run(self, x: Array, **given: Any) -> tuple[Array, ...]:  # type: ignore[override]
        window = None if len(self.output) > 1 else _pooling(given)
        if window is None:
            return super()._run(x, **given)
        return (_MAX_POOLS[x.ndim - 2](_tensor(x), *window).numpy(),)


class AveragePool(SlowAveragePool):
    """Average-pooling by PyTorch, if it computes the same."""

    op_domain = ""

    def _run(self, x: Array, **given: Any) -> tuple[Array, ...]:  # type: ignore[override]
        window = _pooling(given)
        if window is None:
            return super()._run(x, **given)
        return (_AVERAGE_POOLS[x.ndim - 2](_tensor(x), *window, False, bool(given["count_include_pad"])).numpy(),)


class BatchNormalization(BatchNormalization_14):
    """Batch normalization in evaluation. The reference takes some older versions of it for training."""

    op_domain = ""

    def _run(self, x: Array, *tensors: Array, **given: Any) -> tuple[Array, ...]:
        if given.get("training_mode"):
            return super()._run(x, *tensors, **given)
        scale, bias, mean, var = (tensor.reshape(-1, *(1,) * (x.ndim - 2)) for tensor in tensors)
        return ((scale * (x - mean) / np.sqrt(var + given["epsilon"]) + bias).astype(x.dtype),)


FAST = [BatchNormalization, Conv, ConvTranspose, MaxPool, AveragePool]
