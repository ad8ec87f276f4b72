"""Values whose squares exceed the range of their dtype, up to the documented limit and beyond."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.ops import implementations
from tests.ops.test_same_bits import placed

ATTRIBUTES = (1e-5, "none", 0.0)
NAMES = [name for name in implementations.names() if name in ("eager", *implementations.names()[1:2])]


def of_scale(scale: float, dtype: torch.dtype, layout: str, *, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """x of this standard deviation in one channel and of 1 in the others, and dy."""
    x, dy = (placed(torch.randn(16, 5, 6, 7, dtype=torch.float64), layout) for _ in range(2))
    x[:, 2] = (x[:, 2] + offset) * scale
    return x.to(dtype), dy.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e17), (torch.float32, 1.5e19), (torch.bfloat16, 5e18), (torch.float64, 5e153)],
    ids=str,
)
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_variance_that_fits_is_right(name: str, layout: str, offset: float, dtype: torch.dtype, scale: float) -> None:
    x, dy = of_scale(scale, dtype, layout, offset=offset)
    exact = x.double().clone()
    exact[:, 2] /= scale
    with implementations.chosen(name) as op:
        y, mean, mean_low, var = op("train_forward")(x, None, None, None, *ATTRIBUTES)
        kept = (dy, x, None, None, mean, mean_low, var, None, None)
        dx = op("train_backward")(*kept, *ATTRIBUTES, False)[0]
        wanted, wide_mean, wide_low, wide_var = op("train_forward")(exact, None, None, None, *ATTRIBUTES)
        kept = (dy.double(), exact, None, None, wide_mean, wide_low, wide_var, None, None)
        wanted_dx = op("train_backward")(*kept, *ATTRIBUTES, False)[0]
    assert var.isfinite().all()
    close = {"rtol": 1e-4, "atol": 2e-2 if dtype == torch.bfloat16 else 1e-4}
    assert_close(y.double(), wanted, **close)
    assert_close(var[2].double() / scale / scale, wide_var[2].double(), rtol=1e-4, atol=0.0)
    dx = dx.double()
    dx[:, 2] *= scale
    assert_close(dx, wanted_dx, **close)


@pytest.mark.parametrize("value", [4e36, 1e38])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_a_variance_that_does_not_fit_is_infinite_and_y_is_the_bias(name: str, layout: str, value: float) -> None:
    x = placed(torch.full((64, 3, 8, 8), value), layout)
    x[:, :, ::2] *= -1
    x[:, 0] = torch.randn(64, 8, 8)
    with implementations.chosen(name) as op:
        y, mean, _, var = op("train_forward")(x, None, torch.full((3,), 0.5), None, *ATTRIBUTES)
        alone = op("train_forward")(x[:, :1].expand(-1, 3, -1, -1).contiguous(), None, None, None, *ATTRIBUTES)[0]
    assert (y[:, 1:] == 0.5).all()
    assert mean.isfinite().all()
    assert var.isinf().tolist() == [False, True, True]
    assert_close(y[:, 0], alone[:, 0] + 0.5)
