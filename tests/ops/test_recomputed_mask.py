"""The ReLU's mask, which backward recomputes from x: it must have forward's bits."""

from __future__ import annotations

import pytest
import torch

from batchnorm.ops import eager
from tests.cases import Case
from tests.ops import implementations

CASES = [
    Case((3, 5, 7, 7)),
    Case((2, 3, 3)),
    Case((4, 3, 16, 16), layout="channels_last"),
    Case((30, 33)),
    Case((4, 3, 8, 8), torch.float64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", implementations.names())
def test_the_mask_of_backward_is_that_of_forward_where_z_is_a_rounding_error(name: str, case: Case) -> None:
    x, (weight, bias) = case.x(), case.parameters()
    z, *_ = eager.train_forward(x, weight, bias, None, 1e-5, "none", 0.0)
    residual = -z * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, z.shape).to(x.dtype))
    with implementations.chosen(name) as op:
        y, *statistics = op("train_forward")(x, weight, bias, residual, 1e-5, "relu", 0.0)
        saved = (torch.ones_like(x), x, residual, None, *statistics, weight, bias)
        *_, dz = op("train_backward")(*saved, 1e-5, "relu", 0.0, True)
    assert 0 < (y > 0).sum() < y.numel()
    assert torch.equal(dz > 0, y > 0)
