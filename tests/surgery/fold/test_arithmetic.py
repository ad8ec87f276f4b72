"""The weights that folding computes, against the operations they stand for, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from batchnorm.surgery.fold import arithmetic
from batchnorm.surgery.fold.arithmetic import NotRepresentable, ScaleShift


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def scale_shift(channels: int) -> ScaleShift:
    return ScaleShift(wide(channels), wide(channels))


def applied(s: ScaleShift, x: Tensor) -> Tensor:
    along = (1, -1, *(1,) * (x.dim() - 2))
    return x * s.scale.reshape(along) + s.shift.reshape(along)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scale_and_shift_are_batch_normalization() -> None:
    x, mean, var, weight, bias = wide(3, 4, 5), wide(4), torch.rand(4).double(), wide(4), wide(4)
    assert_close(
        applied(ScaleShift.of(mean, var, weight, bias, 1e-3), x), F.batch_norm(x, mean, var, weight, bias, eps=1e-3)
    )
    assert_close(applied(ScaleShift.of(mean, var), x), F.batch_norm(x, mean, var))


def test_arrays_and_half_precision_are_taken() -> None:
    mean, var = np.array([1.0, 2.0], np.float32), torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    s = ScaleShift.of(mean, var, eps=1.0)
    assert s.scale.dtype == torch.float64
    assert_close(s.scale, torch.tensor([0.5, 1 / np.sqrt(5.0)], dtype=torch.float64))


def test_then_and_split() -> None:
    first, second, x = scale_shift(4), scale_shift(4), wide(2, 4)
    assert_close(applied(first.then(second), x), applied(second, applied(first, x)))
    left, right = first.split([1, 3])
    assert_close(torch.cat([applied(left, x[:, :1]), applied(right, x[:, 1:])], 1), applied(first, x))


CONVOLUTIONS = [
    (F.conv1d, (6, 4, 3), 1, 1), (F.conv2d, (6, 2, 3, 2), 2, 2), (F.conv2d, (8, 1, 3, 3), 4, 2),
    (F.conv3d, (6, 4, 2, 2, 1), 1, 3),
]  # fmt: skip
TRANSPOSED = [(F.conv_transpose1d, (4, 6, 3), 1, 1), (F.conv_transpose2d, (4, 3, 3, 2), 2, 2)]


@pytest.mark.parametrize(("function", "shape", "groups", "dims"), CONVOLUTIONS + TRANSPOSED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_into_the_layer_before(function, shape, groups: int, dims: int, with_bias: bool) -> None:
    transposed = "transpose" in function.__name__
    out = shape[1] * groups if transposed else shape[0]
    weight, bias, s, x = wide(*shape), wide(out) if with_bias else None, scale_shift(out), wide(2, 4, *(7,) * dims)
    folded = arithmetic.into_producer(weight, bias, s, groups=groups, transposed=transposed)
    expected = applied(s, function(x, weight, bias, groups=groups, stride=2))
    assert_close(function(x, folded.weight, folded.bias, groups=groups, stride=2), expected)


@pytest.mark.parametrize(("function", "shape", "groups", "dims"), CONVOLUTIONS + TRANSPOSED)
@pytest.mark.parametrize("padding", [0, 1])
def test_into_the_layer_after_with_its_border(function, shape, groups: int, dims: int, padding: int) -> None:
    transposed = "transpose" in function.__name__
    weight, s, x = wide(*shape), scale_shift(4), wide(2, 4, *(7,) * dims)
    s.scale[0] = 0.0
    options = {"stride": 2, "padding": padding}
    folded, kernel = arithmetic.into_consumer(weight, s, groups=groups, transposed=transposed)
    border = function(torch.ones_like(x[:1, :1]), kernel, **options)
    expected = function(applied(s, x), weight, groups=groups, **options)
    assert_close(function(x, folded, groups=groups, **options) + border, expected)
    if not padding and not transposed:
        assert_close(function(x, folded, arithmetic.interior(kernel), groups=groups, **options), expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_scale_is_a_pointwise_convolution(groups: int) -> None:
    scale, x = wide(4), wide(2, 4, 5, 5)
    kernel = arithmetic.as_kernel(scale, groups=groups, dims=2)
    assert_close(F.conv2d(x, kernel, groups=groups), x * scale.reshape(1, -1, 1, 1))


def test_a_kernel_in_a_larger_one() -> None:
    weight, x = wide(3, 4, 3, 1), wide(2, 4, 9, 9)
    large = arithmetic.embedded(weight, (5, 3), (0, 1), (2, 1))
    assert_close(F.conv2d(x, large, padding=(2, 1)), F.conv2d(x, weight, padding=(2, 0), dilation=(2, 1)))


@pytest.mark.parametrize(("groups", "into"), [(4, 1), (4, 2), (2, 1), (2, 2)])
def test_fewer_groups(groups: int, into: int) -> None:
    weight, x = wide(8, 8 // groups, 3, 3), wide(2, 8, 5, 5)
    fewer = arithmetic.regrouped(weight, groups=groups, into=into)
    assert_close(F.conv2d(x, fewer, groups=into), F.conv2d(x, weight, groups=groups))


def test_rounding_keeps_dtype_and_memory_format_and_refuses_overflow() -> None:
    like = torch.zeros(2, 3, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    found = arithmetic.rounded(wide(2, 3, 4, 4), like)
    assert found.dtype == torch.float16
    assert found.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(NotRepresentable, match=r"folded weights must be finite in torch.float16, got 1e\+05"):
        arithmetic.rounded(torch.full((2,), 1e5, dtype=torch.float64), like)
