"""Batch normalization of the last axis, as networks for sequences write it: between reshapes and transposes."""

from __future__ import annotations

import io
from collections.abc import Callable

import onnx
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.fold.onnx import fold_onnx
from tests.surgery.fold.onnx.graphs import ops
from tests.surgery.fold.pytorch.test_fold import trained

SEQUENCES, IMAGES = torch.randn(4, 5, 6), torch.randn(2, 6, 8, 8)


class Net(nn.Module):
    def __init__(self, compute: Callable[[Net, Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 6), norm, nn.Linear(6, 3)
        self.conv, self.compute = nn.Conv2d(6, 6, 3, padding=1), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x).relu()


def _sizes(m: Net, x: Tensor) -> Tensor:
    n, length, channels = x.shape
    return m.norm(m.inner(x).view(n * length, channels)).view(n, length, channels)


def _dtype(m: Net, x: Tensor) -> Tensor:
    y = m.norm(m.inner(x).view(-1, 6))
    return y.to(y.dtype).reshape(x.shape)


def _numel(m: Net, x: Tensor) -> Tensor:
    y = m.inner(x)
    return m.norm(y.view(y.numel() // 6, 6)).view_as(y)


def _tokens(m: Net, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    y = m.conv(x).flatten(2).transpose(1, 2)
    return m.norm(y.reshape(-1, channels)).reshape(n, height * width, channels)


def _image_of_tokens(m: Net, x: Tensor) -> Tensor:
    n, channels, height, width = x.shape
    return m.norm(m.inner(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, channels, height, width))


def _residual(m: Net, x: Tensor) -> Tensor:
    y = (x + m.inner(x)).transpose(1, 2)
    return m.outer(m.norm(y).transpose(1, 2))


NETS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "before a linear layer": lambda m, x: m.outer(m.norm(x.reshape(-1, 6)).reshape(x.shape)),
    "between": lambda m, x: m.outer(m.norm(m.inner(x).reshape(-1, x.shape[-1])).reshape(x.shape)),
    "size": lambda m, x: m.norm(m.inner(x).view(-1, x.size(-1))).view(x.size()),
    "sizes": _sizes,
    "size and -1": lambda m, x: m.norm(m.inner(x).view(x.size(0) * x.size(1), -1)).view(x.size(0), x.size(1), -1),
    "sum of shapes": lambda m, x: m.norm(m.inner(x).reshape(-1, 6)).reshape(x.shape[:-1] + (6,)),  # noqa: RUF005
    "function": lambda m, x: torch.reshape(m.norm(torch.reshape(m.inner(x), (-1, 6))), x.shape),
    "reshape_as": lambda m, x: m.norm(m.inner(x).reshape(-1, 6)).reshape_as(x),
    "flatten": lambda m, x: m.norm(torch.flatten(m.inner(x), 0, 1)).unflatten(0, (x.shape[0], x.shape[1])),
    "unflatten": lambda m, x: torch.unflatten(m.norm(m.inner(x).flatten(0, 1)), 0, x.shape[:2]),
    "numel": _numel,
    "dtype": _dtype,
    "transpose": lambda m, x: m.norm(m.inner(x).transpose(1, 2)).transpose(1, 2),
    "permute": lambda m, x: m.outer(m.norm(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1)),
    "swapaxes": lambda m, x: m.norm(m.inner(x).swapaxes(1, 2)).swapaxes(1, 2),
    "swapdims": lambda m, x: m.norm(m.inner(x).swapdims(1, 2)).swapdims(1, 2),
    "torch.swapaxes": lambda m, x: torch.swapaxes(m.norm(torch.swapaxes(m.inner(x), 1, 2)), 1, 2),
    "torch.moveaxis": lambda m, x: torch.moveaxis(m.norm(torch.moveaxis(m.inner(x), 2, 1)), 1, 2),
    "movedim": lambda m, x: m.norm(m.inner(x).movedim(2, 1)).movedim(1, 2),
    "mT": lambda m, x: m.norm(m.inner(x).mT).mT,
    "residual": _residual,
    "tokens": _tokens,
    "image of tokens": _image_of_tokens,
}


def _example(name: str) -> Tensor:
    return IMAGES if "tokens" in name else SEQUENCES


def _net(name: str) -> nn.Module:
    return trained(Net(NETS[name], (nn.BatchNorm2d if name == "image of tokens" else nn.BatchNorm1d)(6)))


@pytest.mark.parametrize("name", NETS)
def test_reshapes_with_computed_sizes_are_passed(name: str) -> None:
    model, x = _net(name), _example(name)
    folded, report = bn.fold(model, x)
    assert (report.how, report.before, report.remaining, report.fused) == ("fx", 1, 0, 0), str(report)
    with torch.no_grad():
        for other in (x, x[:1], torch.cat([x, x])):
            assert torch.allclose(folded(other), model(other), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NETS if name != "mT"])  # torch exports no mT
def test_reshapes_with_computed_sizes_are_passed_in_onnx_graphs(name: str) -> None:
    model, x = _net(name), _example(name)
    file = io.BytesIO()
    torch.onnx.export(
        model, (x,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}, do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,
    )  # fmt: skip
    graph = onnx.load_from_string(file.getvalue())
    assert "BatchNormalization" in ops(graph)
    folded, report = fold_onnx(graph)
    assert report.remaining == 0, str(report)
    assert "BatchNormalization" not in ops(folded)
