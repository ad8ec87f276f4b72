"""The activations at large values and at their kinks, in every implementation, and their names in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from batchnorm import ops
from tests.cases import ACTIVATIONS, KINKS, torch_activation
from tests.ops import implementations

POINTS = (-1e30, -1e4, -200.0, -104.0, -88.5, -20.5, -1.0, -0.5, -1e-6, 1e-6, 0.5, 20.5, 88.5, 200.0, 1e4, 1e30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", implementations.names())
def test_large_values_and_kinks_agree_with_torch(name: str, activation: str, dtype: torch.dtype) -> None:
    x = torch.tensor([*POINTS, *KINKS[activation]], dtype=dtype).repeat(16)[:, None]  # whole vectors of each
    zero, one, attributes = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype), (0.0, activation, 0.2)
    leaf = x.clone().requires_grad_()
    expected = torch_activation(activation, 0.2)(leaf)
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    with implementations.chosen(name) as op:
        y = op("normalize")(x, zero, None, one, None, None, None, None, *attributes)
        statistics = (zero, None, one, None, None)
        dx = op("normalize_backward")(torch.ones_like(x), x, None, None, *statistics, None, 1, *attributes, False)[0]
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-14}
    assert_close(y, expected.detach(), **close)
    assert_close(dx, slope, **close)


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "none"])
def test_every_spelling_is_recognized(activation: str) -> None:
    row = ops.ACTIVATIONS[activation]
    assert row.spellings[0].name == activation
    for spelling in row.spellings:
        expected = (activation, row.default)
        for method in (spelling.name, f"{spelling.name}_"):
            assert ops.called_activation(method, (), spelling.required, gradients=False) == expected
        if spelling.module is not None:
            module = spelling.module(**{k: v for k, v in spelling.required.items() if "scale" not in k})
            assert ops.module_activation(module) == expected
            x = torch.linspace(-7, 7, 50, dtype=torch.float64, requires_grad=True)
            y = module(x)
            assert_close(y, row.forward(x, row.default))
            assert_close(torch.autograd.grad(y.sum(), x)[0], row.backward(torch.ones_like(x), x, row.default))


def test_the_documentation_lists_every_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import activation_table

    page = activation_table.on_page_markdown("<!-- activations -->")
    assert "| `relu6` | min(max(z, 0), 6) | 0, 6 |" in page and "| −3, 3 |" in page
    for name, row in ops.ACTIVATIONS.items():
        assert page.count(f"\n| `{name}` | {row.formula} | ") == 1


def test_a_call_with_other_arguments_is_not_recognized() -> None:
    for module in (nn.Hardtanh(), nn.GELU("tanh"), nn.Softplus(), nn.SELU(), nn.Identity()):
        assert ops.module_activation(module) is None
    assert ops.module_activation(nn.Hardtanh(0, 6, inplace=True)) == ("relu6", 0.0)
    assert ops.module_activation(nn.ELU(0.5)) == ("elu", 0.5)
    assert ops.called_activation(F.elu, (0.5, True), {}) == ("elu", 0.5)
    assert ops.called_activation(F.gelu, (), {"approximate": "tanh"}) is None
    assert ops.called_activation(F.leaky_relu, (torch.tensor(0.2),), {}) is None
    # The gradient of a clamp at its bounds is not that of relu6.
    assert ops.called_activation(torch.clamp, (0, 6), {}) is None
    assert ops.called_activation(torch.clamp, (), {"min": 0, "max": 6}, gradients=False) == ("relu6", 0.0)
