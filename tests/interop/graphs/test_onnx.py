"""ONNX export in evaluation mode, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from tests.cases import ACTIVATIONS

# torch's exporter, of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")


class Network(nn.Module):
    """Every activation, with and without a residual, and each rank (the older exporter fails at torch's own there)."""

    def __init__(self, ranks: bool) -> None:
        super().__init__()
        self.ranks = ranks
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), bn.BatchNorm2d(4)
        self.acts = nn.ModuleList(
            bn.BatchNormAct2d(4, activation=a, negative_slope=0.2, alpha=0.7) for a in ACTIVATIONS
        )
        self.volume, self.line = bn.BatchNormAct3d(4), bn.BatchNormAct1d(4, bias=False, activation="none")
        self.plain, self.last = bn.BatchNorm1d(4, affine=False), bn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        for act in self.acts:
            x = act(act(x), x)
        if not self.ranks:
            return x
        x = self.volume(x.unsqueeze(-1)).squeeze(-1)
        return self.last(self.plain(self.line(x.flatten(2)).mean(2)))


def network(ranks: bool) -> Network:
    model = Network(ranks).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                for tensor in module.state_dict().values():
                    tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else None
    return model


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize(
    "dynamo", [pytest.param(True, id="dynamo"), pytest.param(False, id="torchscript", marks=DEPRECATED)]
)
def test_an_exported_network_gives_eagers_results(tmp_path: Path, dynamo: bool) -> None:
    model, x = network(ranks=dynamo), torch.randn(4, 3, 6, 6)
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch", min=2)}}}
    if not dynamo:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, **options)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    assert "BatchNormalization" in {node.op_type for node in graph.graph.node}
    for size in (4, 2, 9):
        x = torch.randn(size, 3, 6, 6)
        assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-5)
