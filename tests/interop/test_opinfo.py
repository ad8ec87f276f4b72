"""torch's own samples for `nn.functional.batch_norm` against `batchnorm.functional.batch_norm`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

from batchnorm import functional

INFO = next(op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name)
DTYPES = sorted(INFO.dtypes, key=str)


def copies(values: Any) -> list[Any]:
    return [v.detach().clone().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]


def samples(dtype: torch.dtype) -> list[tuple[list[Any], dict[str, Any]]]:
    torch.manual_seed(0)
    return [([s.input, *s.args], dict(s.kwargs)) for s in INFO.sample_inputs("cpu", dtype, requires_grad=True)]


def sample_id(sample: tuple[list[Any], dict[str, Any]]) -> str:
    args, kwargs = sample
    shape = "x".join(map(str, args[0].shape))
    affine = "affine" if args[3] is not None else "plain"
    return "-".join([shape, affine, *(f"{k}={v}" for k, v in kwargs.items())])


DOUBLES = samples(torch.float64)
DOUBLE = pytest.mark.parametrize("sample", DOUBLES, ids=sample_id)


def test_there_are_samples() -> None:
    assert len(DOUBLES) >= 12
    assert torch.float64 in DTYPES
    assert torch.bfloat16 in DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples_give_torchs_values_gradients_and_running_statistics(dtype: torch.dtype) -> None:
    # torch's in float64: its own rounding in half types is larger than half's.
    for args, kwargs in samples(dtype):
        ours, theirs = (
            copies(args),
            copies([a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args]),
        )
        y, expected = functional.batch_norm(*ours, **kwargs), F.batch_norm(*theirs, **kwargs)
        assert_close(y, expected.to(dtype))
        dy = torch.randn_like(y)
        y.backward(dy)
        expected.backward(dy.double())
        for mine, its in zip(ours, theirs, strict=True):
            if isinstance(its, Tensor):
                assert_close(mine, its.to(dtype))
                assert (mine.grad is None) == (its.grad is None)
                if its.grad is not None:
                    assert_close(mine.grad, its.grad.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noncontiguous_samples_give_the_same(dtype: torch.dtype) -> None:
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=False):
        apart = sample.noncontiguous()
        y = functional.batch_norm(apart.input, *apart.args, **apart.kwargs)
        assert_close(y, functional.batch_norm(sample.input, *sample.args, **sample.kwargs))


def differentiable(sample: tuple[list[Any], dict[str, Any]]) -> tuple[Any, tuple[Tensor, ...]]:
    """Return the sample as a function of the tensors with a gradient, with new running statistics in each call."""
    args, kwargs = sample
    x, running_mean, running_var, weight, bias = copies(args)
    inputs = tuple(t for t in (x, weight, bias) if t is not None)

    def function(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        running = [None if t is None else t.clone() for t in (running_mean, running_var)]
        return functional.batch_norm(x, *running, weight, bias, **kwargs)

    return function, inputs


@DOUBLE
def test_first_derivatives_of_samples(sample: tuple[list[Any], dict[str, Any]]) -> None:
    function, inputs = differentiable(sample)
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=INFO.supports_forward_ad,
        check_batched_grad=INFO.check_batched_grad,
        check_batched_forward_grad=INFO.check_batched_forward_grad,
    )


@DOUBLE
def test_second_derivatives_of_samples(sample: tuple[list[Any], dict[str, Any]]) -> None:
    function, inputs = differentiable(sample)
    assert torch.autograd.gradgradcheck(
        function,
        inputs,
        check_fwd_over_rev=INFO.supports_fwgrad_bwgrad,
        check_batched_grad=INFO.check_batched_gradgrad,
    )


def test_the_derivative_checks_can_fail() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: functional.batch_norm(x, None, None, training=True) + x.detach(), (x,))
