"""`torch.export` and `torch.jit.trace`: saved programs run without `batchnorm` installed."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn

# Runs every saved program on each input, and saves results and states, where `batchnorm` cannot be imported.
ELSEWHERE = """
import sys, warnings
from pathlib import Path
sys.modules["batchnorm"] = None
import torch
warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
inputs, results = torch.load("inputs.pt"), {}
for path in sorted(Path().glob("*.pt2")) + sorted(Path().glob("*.traced")):
    module = torch.export.load(path).module() if path.suffix == ".pt2" else torch.jit.load(str(path))
    results[path.stem] = [module(x) for x in inputs], dict(module.state_dict())
try:
    import batchnorm
except ImportError:
    torch.save(results, "results.pt")
"""


class Network(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = bn.BatchNorm2d(4, **options)
        self.act = bn.BatchNormAct2d(4, activation="silu", **options)
        self.last = bn.BatchNormAct1d(4, activation="leaky_relu", negative_slope=0.2, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.last(self.act(x, x).mean((2, 3)))


def network(training: bool, **options: Any) -> Network:
    model = Network(**options).double()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "conv" not in key and tensor.is_floating_point():
                tensor.uniform_(0.5, 2.0)
    model.train(training)
    return model


def batches() -> list[Tensor]:
    return [torch.randn(size, 3, 6, 6, dtype=torch.float64) for size in (4, 2, 7)]


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])


def exported(model: nn.Module, x: Tensor, *, strict: bool) -> torch.export.ExportedProgram:
    """Export a copy for every batch size, because a program shares its model's buffers."""
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    return torch.export.export(copy.deepcopy(model), (x,), dynamic_shapes=shapes, strict=strict)


def assert_same_state(state: dict[str, Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
    missing = expected.keys() - state.keys()
    assert all(not model.training and key.endswith("num_batches_tracked") for key in missing)  # what it does not use
    assert_close(dict(state), {key: expected[key] for key in state}, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.torch.jit.(trace|save|load).:DeprecationWarning")
def test_saved_programs_run_without_batchnorm_installed(tmp_path: Path) -> None:
    models: dict[str, Network] = {}
    inputs = batches()
    torch.save(inputs, tmp_path / "inputs.pt")
    for training, strict in product((True, False), (True, False)):
        name = f"training={training},strict={strict}"
        models[name] = network(training)
        torch.export.save(exported(models[name], inputs[0], strict=strict), tmp_path / f"{name}.pt2")
    models["traced"] = network(False)
    torch.jit.trace(models["traced"], inputs[0]).save(str(tmp_path / "traced.traced"))

    run = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == models.keys()
    for name, model in models.items():
        outputs, state = results[name]
        for x, y in zip(inputs, outputs, strict=True):
            assert_close(y, model(x), rtol=1e-10, atol=1e-10)
        assert_same_state(state, model)
        assert model.norm.num_batches_tracked == (3 if model.training else 0)


@TRAINING
@STRICT
def test_programs_contain_torchs_batch_norm(strict: bool, training: bool) -> None:
    model, (x, *_) = network(training), batches()
    before = copy.deepcopy(model.state_dict())
    program = torch.export.export(model, (x,), strict=strict)
    assert_close(model.state_dict(), before, rtol=0, atol=0)  # exporting is no step
    assert any("batch_norm" in name for name in operators(program))
    assert not any("batchnorm" in name for name in operators(program))


@STRICT
@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=lambda options: "-".join(options),
)
@TRAINING
def test_every_option_exports(options: dict[str, Any], training: bool, strict: bool) -> None:
    model, inputs = network(training, **options), batches()
    program = exported(model, inputs[0], strict=strict)
    assert not any("batchnorm" in name for name in operators(program))
    module = program.module()
    for x in inputs:
        assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)
    assert_same_state(module.state_dict(), model)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")  # torch, of itself
@STRICT
def test_decomposed_programs_contain_no_operator_of_ours(strict: bool) -> None:
    model, (x, *_) = network(False), batches()
    program = torch.export.export(model, (x,), strict=strict).run_decompositions()
    assert operators(program)
    assert not any("batchnorm" in name for name in operators(program))
    assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("option", ["skip", "error"])
def test_skipping_and_raising_are_refused_in_training_and_exported_in_evaluation(option: str) -> None:
    model, (x, *_) = network(True, on_nonfinite=option), batches()
    with pytest.raises(ValueError, match=rf"on_nonfinite='propagate' in an exported training graph, got '{option}'"):
        torch.export.export(model, (x,), strict=False)
    program = torch.export.export(model.eval(), (x,))
    assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)


def test_a_layer_without_updates_exports_batch_statistics_that_update_nothing() -> None:
    model, (x, *_) = network(True), batches()
    with bn.update_running_stats(model, False):
        module = torch.export.export(model, (x,)).module()
        before = copy.deepcopy(dict(module.state_dict()))
        assert_close(module(x), model(x), rtol=1e-10, atol=1e-10)
        assert_close(dict(module.state_dict()), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.:DeprecationWarning")
def test_a_trace_contains_torchs_batch_norm() -> None:
    traced = torch.jit.trace(network(False), batches()[0])
    assert "batchnorm::" not in str(traced.inlined_graph)
    assert "aten::batch_norm" in str(traced.inlined_graph)
