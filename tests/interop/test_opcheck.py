"""`torch.library.opcheck`: schemas, fakes and registered derivatives of every operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm.ops  # noqa: F401  (defines the operators)
from batchnorm.ops.schemas import SCHEMAS

ops = torch.ops.batchnorm

EPS, SLOPE = 1e-5, 0.1
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

variants = pytest.mark.parametrize(
    ("dtype", "layout", "affine", "extra"),
    [
        (torch.float32, "contiguous", True, "none"),
        (torch.float32, "contiguous", False, "none"),
        (torch.float32, "channels_last", True, "residual"),
        (torch.float32, "contiguous", True, "index"),
        (torch.float32, "channels_last", False, "index"),
        (torch.float64, "channels_last", False, "residual"),
        (torch.bfloat16, "channels_last", True, "residual"),
        (torch.float16, "contiguous", True, "none"),
    ],
    ids=lambda v: str(v).removeprefix("torch.") if not isinstance(v, bool) else ("affine" if v else "plain"),
)


class Arguments:
    """Tensors for one call of an operator."""

    def __init__(self, dtype: torch.dtype, layout: str, affine: bool, extra: str, *, grad: bool = True) -> None:
        shape, self.rows = (4, 3, 5, 5), 2

        def like_x(requires_grad: bool = False) -> Tensor:
            x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            return x.requires_grad_(requires_grad and grad)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.indexed = extra == "index"
        vectors = (self.rows, shape[1]) if self.indexed else (shape[1],)

        def vector(low: float, requires_grad: bool = True) -> Tensor:
            return (torch.rand(vectors, dtype=wide) + low).requires_grad_(requires_grad and grad)

        self.x, self.dy = like_x(True), like_x()
        self.residual = like_x(True) if extra == "residual" else None
        self.index = torch.tensor([0, 1, 1, 0]) if self.indexed else None
        self.groups = self.rows if self.indexed else 1
        self.weights = torch.rand(shape[0], *shape[2:], dtype=wide)
        self.weight, self.bias = (vector(0.5), vector(-0.5)) if affine else (None, None)
        self.mean, self.mean_low, self.var = vector(-0.5, False), vector(0, False) * 1e-6, vector(0.5, False)
        self.statistics = (self.mean, self.mean_low, self.var)

    def kept(self, activation: str) -> tuple[Any, ...]:
        """Return the first arguments of every backward operator, including y or the residual if there is one."""
        residual = y = None
        if self.residual is not None and activation != "none":
            y = self.residual.detach() if activation == "relu" else None
            residual = self.residual.detach() if activation == "silu" else None
        plain = [None if t is None else t.detach() for t in (self.weight, self.bias)]
        return (self.dy, self.x.detach(), residual, y, *self.statistics, *plain)


# The last one traces a graph, which takes most of the time. The graph does not depend on the dtype.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check(op: Callable[..., Any], *args: Any, traced: bool = True) -> None:
    traced = traced and args[0].dtype == torch.float32
    results = torch.library.opcheck(op, args, test_utils=CHECKS if traced else CHECKS[:-1])
    assert set(results.values()) == {"SUCCESS"}


def is_traced(affine: bool, activation: str) -> bool:
    """Return whether a graph is traced: for every pair of an extra and an activation, once without γ and β."""
    return affine or activation == "silu"


ACTIVATIONS = pytest.mark.parametrize("activation", ["none", "relu", "silu"])


@ACTIVATIONS
@variants
def test_train_forward(dtype: torch.dtype, layout: str, affine: bool, extra: str, activation: str) -> None:
    a, traced = Arguments(dtype, layout, affine, extra), is_traced(affine, activation)
    if a.indexed:  # one set of statistics, and so of affine parameters, for all
        a.weight, a.bias = (None if t is None else t.detach()[0].requires_grad_() for t in (a.weight, a.bias))
    check(ops.train_forward, a.x, a.weight, a.bias, a.residual, EPS, activation, SLOPE, traced=traced)


@ACTIVATIONS
@variants
def test_normalize(dtype: torch.dtype, layout: str, affine: bool, extra: str, activation: str) -> None:
    a, traced = Arguments(dtype, layout, affine, extra), is_traced(affine, activation)
    arguments = (a.weight, a.bias, a.residual, a.index, EPS, activation, SLOPE)
    check(ops.normalize, a.x, *a.statistics, *arguments, traced=traced)
    check(ops.normalize, a.x, a.mean, None, a.var, *arguments, traced=traced)
    if not a.indexed:  # a SyncBatchNorm's statistics are differentiated
        differentiable = (t.detach().requires_grad_() for t in a.statistics)
        check(ops.normalize, a.x, *differentiable, *arguments, traced=traced)


@pytest.mark.parametrize("weighted", [False, True], ids=["every_value", "weighted"])
@variants
def test_moments(dtype: torch.dtype, layout: str, affine: bool, extra: str, weighted: bool) -> None:
    a = Arguments(dtype, layout, affine, extra)
    check(ops.moments, a.x, a.index, a.weights if weighted else None, a.groups)


@ACTIVATIONS
@variants
def test_backward_operators(dtype: torch.dtype, layout: str, affine: bool, extra: str, activation: str) -> None:
    a, traced = Arguments(dtype, layout, affine, extra), is_traced(affine, activation)
    kept, attributes = a.kept(activation), (EPS, activation, SLOPE)
    need_dz = a.residual is not None
    if not a.indexed:
        check(ops.train_backward, *kept, *attributes, need_dz, traced=traced)
    check(ops.normalize_backward, *kept, a.index, a.groups, *attributes, need_dz, traced=traced)
    means = (torch.rand_like(a.mean), torch.rand_like(a.mean))
    check(ops.backward_apply, *kept, *means, a.index, a.weights, *attributes, need_dz, traced=traced)
    check(ops.backward_apply, *kept, None, None, a.index, None, *attributes, not need_dz, traced=traced)
    check(ops.backward_reduce, *kept, a.index, a.groups, *attributes, traced=traced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("momentum", "skip_nonfinite", "count"),
    [(0.1, False, None), (None, False, 7.5), (0.1, True, 7.5), (None, True, None)],
)
def test_update_running(dtype: torch.dtype, momentum: float | None, skip_nonfinite: bool, count: float | None) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    running = (torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))
    batch = (torch.randn(3, dtype=wide), torch.zeros(3, dtype=wide), torch.rand(3, dtype=wide))
    number = None if count is None else torch.tensor(count, dtype=torch.float64)
    for tracked in (torch.tensor(2), *([] if momentum is None else [None])):
        check(ops.update_running_, *running, tracked, *batch, 8, number, momentum, skip_nonfinite)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_running(dtype: torch.dtype) -> None:
    check(ops.copy_running, torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype))


def test_every_operator_is_checked_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for name in SCHEMAS:
        assert f"check(ops.{name}, " in source
