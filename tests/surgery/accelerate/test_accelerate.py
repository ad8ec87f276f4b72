"""`batchnorm.surgery.accelerate`: the same network and the same training, on whatever model it is tried."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm import memory
from batchnorm.ops import strict
from batchnorm.surgery.accelerate.accelerate import accelerate, undo_fusion
from batchnorm.surgery.convert.convert import convert
from tests.surgery import networks
from tests.surgery.networks import NETWORKS, network

ROOT = Path(__file__).parents[3]
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


def train(model: nn.Module, shape: tuple[int, ...], steps: int, rate: float = 0.05) -> list[float]:
    """Losses on batches that are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)  # dropout
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, *shape, generator=generator, dtype=torch.float64)
        y = model(x)
        target = torch.randint(5, (8, *y.shape[2:]), generator=generator)
        loss = F.cross_entropy(y, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@EVERY_NETWORK
def test_twenty_steps_have_the_losses_of_the_model_as_it_was(name: str) -> None:
    model, x = network(name)
    _, shape, layers, fused = NETWORKS[name]
    fast, report = accelerate(model, x[:2])
    assert (len(report.changed), len(report.left), len(report.fused)) == (layers, 0, fused)
    assert report.difference < 1e-12
    expected = train(model, shape, 20)
    assert max(expected) - min(expected) > 0.02  # it does train
    assert_close(train(fast, shape, 20), expected, rtol=0, atol=1e-8)
    assert_close(dict(fast.state_dict()), dict(model.state_dict()), rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        assert_close(fast.eval()(x), model.eval()(x), rtol=0, atol=1e-8)


@EVERY_NETWORK
def test_the_fused_operation_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(name)
    fast, report = accelerate(model, x[:2])
    called = []
    own = bn.functional.batch_norm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        called.append((kwargs["activation"], kwargs["residual"] is not None))
        return own(*args, **kwargs)

    monkeypatch.setattr(bn.functional, "batch_norm", counted)
    monkeypatch.setattr(strict, "AVAILABLE", False)  # every layer calls the function
    for mode in (True, False):
        called.clear()
        fast.train(mode)(x)
        expected = [(f.activation, f.residual) for f in report.fused.values()]
        expected += [("none", False)] * (len(report.changed) - len(expected))
        assert sorted(called) == sorted(expected)


def of_transformers(name: str) -> nn.Module:
    """A small network of theirs that returns its logits."""
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "layer_type": "basic"},
        "MobileNetV2": {"depth_multiplier": 0.1, "depth_divisible_by": 2, "min_depth": 2, "tf_padding": False},
        "RegNet": {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 2], "groups_width": 4},
    }[name]
    config = getattr(transformers, f"{name}Config")(num_labels=5, **options)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = getattr(transformers, f"{name}ForImageClassification")(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(pixel_values=x).logits

    return Logits().double().train()


@pytest.mark.parametrize(("name", "layers", "fused"), [("ResNet", 8, 7), ("RegNet", 12, 10)])
def test_models_of_transformers_train_as_they_did(name: str, layers: int, fused: int) -> None:
    model = of_transformers(name)
    fast, report = accelerate(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert (len(report.changed), len(report.fused)) == (layers, fused)
    expected = train(model, (3, 32, 32), 20, rate=1e-3)
    assert max(expected) - min(expected) > 0.02
    assert_close(train(fast, (3, 32, 32), 20, rate=1e-3), expected, rtol=0, atol=1e-8)


def test_every_step_of_a_deep_network_is_the_same() -> None:
    """52 layers of few channels amplify rounding over steps, torch's own too: so from the same weights at each."""
    model = of_transformers("MobileNetV2")
    fast, report = accelerate(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert (len(report.changed), len(report.fused)) == (52, 45)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(20):
        fast.load_state_dict(model.state_dict())
        x, target = torch.randn(8, 3, 32, 32, dtype=torch.float64), torch.randint(5, (8,))
        losses = []
        for network_ in (fast, model):
            network_.zero_grad()
            torch.manual_seed(4)  # dropout
            losses.append(F.cross_entropy(network_(x), target))
            losses[-1].backward()
        assert_close(losses[0], losses[1], rtol=0, atol=1e-8)
        for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True):
            assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-8 * max(1.0, float(theirs.grad.abs().max())))
        optimizer.step()


def test_the_class_and_state_of_the_model_stay() -> None:
    model = networks.ResNet()
    model.layer1[0].bn1.eval()
    seen: list[str] = []
    model.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    parameters, buffers, keys = list(model.parameters()), list(model.buffers()), list(model.state_dict())
    modules = list(model.modules())
    modes = [m.training for m in modules]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast, _ = accelerate(model, torch.randn(2, 3, 12, 12), inplace=True)
    assert fast is model
    assert all(a is b for a, b in zip(modules, fast.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    assert all(a is b for a, b in zip(buffers, fast.buffers(), strict=True))
    assert list(fast.state_dict()) == keys
    assert [m.training for m in fast.modules()] == modes
    assert isinstance(fast, networks.ResNet)
    assert isinstance(fast.layer1[0], networks.BasicBlock)
    assert type(fast.layer1[0]).__name__ == "BasicBlock"
    assert type(fast.bn1) is bn.BatchNorm2d
    assert not any(b.num_batches_tracked for b in fast.modules() if isinstance(b, nn.BatchNorm2d))
    seen.clear()
    fast(torch.randn(4, 3, 12, 12)).sum().backward()
    optimizer.step()
    assert seen == ["bn1"]
    assert fast.layer1[0].bn1.num_batches_tracked == 0  # it was in evaluation
    assert fast.layer1[0].bn2.num_batches_tracked == 1


def test_the_given_model_is_unchanged() -> None:
    model = networks.ResNet()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    fast, _ = accelerate(model, torch.randn(2, 3, 12, 12))
    fast(torch.randn(4, 3, 12, 12)).sum().backward()
    assert [type(m) for m in model.modules()] == classes
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@EVERY_NETWORK
def test_a_copy_is_independent(name: str) -> None:
    model, x = network(name)
    fast, _ = accelerate(model, x[:2])
    copied = copy.deepcopy(fast.eval())
    with torch.no_grad():
        for p in fast.parameters():
            p.zero_()
    assert_close(copied(x), model.eval()(x))
    assert [type(m) for m in copied.modules()] == [type(m) for m in fast.modules()]


LOAD = """
import sys, torch
models = torch.load(sys.argv[1], weights_only=False)
for model, (x, expected) in zip(models, torch.load(sys.argv[2]), strict=True):
    assert any("_rewrite" in vars(type(m)) for m in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    print(type(model).__name__)
"""


def test_a_saved_model_loads_in_another_process(tmp_path: Path) -> None:
    saved, models = [], nn.ModuleList()
    for name in NETWORKS:
        model, x = network(name)
        fast, _ = accelerate(model.eval(), x[:2])
        models.append(fast)
        saved.append((x, fast(x).detach()))
    torch.save(models, tmp_path / "models.pt")
    torch.save(saved, tmp_path / "results.pt")
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "models.pt"), str(tmp_path / "results.pt")]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["ResNet", "MobileNet", "DenseNet", "UNet", "Network3d"]


AFTER_A_CHECKPOINT = """
import warnings, torch, batchnorm as bn
from torch.utils.checkpoint import checkpoint

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(4)

    def forward(self, x):
        return checkpoint(self.bn, x, use_reentrant=False)

bn.accelerate(Block())
warnings.simplefilter("error")
torch.compile(bn.BatchNorm2d(4), backend="aot_eager", fullgraph=True, dynamic=True)(torch.rand(2, 4, 3, 3))
"""


def test_a_traced_checkpoint_does_not_keep_layers_from_compiling() -> None:
    # In a process of its own: the checkpoint must be the first to import dynamo.
    run = subprocess.run([sys.executable, "-c", AFTER_A_CHECKPOINT], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(protocol: int) -> None:
    model, x = network("resnet")
    fast, _ = accelerate(model, x[:2])
    again = pickle.loads(pickle.dumps(fast, protocol))
    assert [type(m) for m in again.modules()] == [type(m) for m in fast.modules()]
    assert_close(again(x), model(x))


@EVERY_NETWORK
def test_undoing_restores_the_class(name: str) -> None:
    model, x = network(name)
    fast, report = accelerate(model, x[:2])
    undone = undo_fusion(fast)
    assert set(undone) >= {f.holder for f in report.fused.values()}
    assert undo_fusion(fast) == []
    assert not any(hasattr(type(m), "_rewrite") for m in fast.modules())
    for module, was in zip(fast.modules(), model.modules(), strict=True):
        assert type(module) is type(was) or isinstance(was, nn.modules.batchnorm._BatchNorm)
    assert_close(fast.eval()(x), model.eval()(x))


@pytest.mark.parametrize("inplace", [False, True])
@EVERY_NETWORK
def test_convert_undoes_it(name: str, inplace: bool) -> None:
    model, x = network(name)
    fast, _ = accelerate(model, x[:2])
    back, report = convert(fast, to=torch.nn, inplace=inplace)
    assert report.left == ()
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    assert torch.equal(back.eval()(x), model.eval()(x))


@pytest.mark.parametrize("kind", [bn.BatchRenorm, bn.GhostBatchNorm, bn.FrozenBatchNorm, nn.GroupNorm, nn.Identity])
def test_a_family_converted_afterwards_computes_what_it_would(kind: type[nn.Module]) -> None:
    model, x = network("resnet")
    options = {"ghost_size": 4} if kind is bn.GhostBatchNorm else {}
    after = convert(accelerate(model, x[:2]).model, to=kind, **options).model
    direct = convert(model, to=kind, **options).model
    for mode in (True, False):
        assert_close(after.train(mode)(x), direct.train(mode)(x))


def test_autocast_and_channels_last() -> None:
    model = networks.ResNet().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    fast, _ = accelerate(model, x[:2])
    plain = copy.deepcopy(fast)
    undo_fusion(plain)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, expected = fast(x), plain(x)
        assert y.dtype == expected.dtype
        assert_close(y, expected, **({"rtol": 0.02, "atol": 0.02} if enabled else {"rtol": 1e-4, "atol": 1e-5}))


def test_a_second_time_changes_nothing() -> None:
    model, x = network("resnet")
    fast, first = accelerate(model, x[:2])
    again, second = accelerate(fast, x[:2])
    assert [type(m) for m in again.modules()] == [type(m) for m in fast.modules()]
    assert dict(second.fused) == dict(first.fused)


def test_the_report_names_keep_memory_for_a_network_with_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "hint", lambda: "memory is not kept")
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.BatchNorm2d(64), nn.ReLU())
    x = torch.randn(2, 3, 64, 64)  # 1 MB for each sample after the convolution
    text = str(accelerate(model, x).report)
    assert "outputs differ by" in text.splitlines()[0]
    assert text.splitlines()[1].startswith("On a CPU, a batch of 33 or more makes tensors above 32 MB")
    assert "batchnorm.keep_memory() before training." in text
    assert not accelerate(model, x[:, :, :4, :4]).report.notes  # thousands of samples
    assert not accelerate(model).report.notes  # sizes are unknown
    monkeypatch.setattr(memory, "hint", lambda: None)
    assert not accelerate(model, x).report.notes


def test_the_report_reads_as_a_table() -> None:
    model, x = network("mobilenet")
    text = str(accelerate(model, x[:2]).report)
    assert "accelerate: 10 changed, 0 left, 9 fused with following operations; outputs differ by" in text
    assert "features.1           torch.nn.BatchNorm2d(6)   BatchNorm2d(6) + hardswish  in features\n" in text
    assert "its result goes to 5 (InvertedResidual)" in text
