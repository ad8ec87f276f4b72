"""A model definition that is not ours: transformers' ResNet, with random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn

transformers = pytest.importorskip("transformers")


def with_ours(model: nn.Module) -> nn.Module:
    """Return a copy with our batch normalization and the same state."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            ours = bn.BatchNorm2d(module.num_features, module.eps, module.momentum, dtype=module.weight.dtype)
            ours.load_state_dict(module.state_dict())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ours.train(module.training))
    return model


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[8, 12, 16],
            depths=[1, 2, 1],
            layer_type="basic",
            num_labels=5,
            downsample_in_first_stage=False,
        )
        return transformers.ResNetForImageClassification(config).double().train()


def losses(model: nn.Module, steps: int, *, compiled: bool = False) -> list[float]:
    """Return the losses of `steps` steps on batches that are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    found = []
    for _ in range(steps):
        images = torch.randn(8, 3, 24, 24, generator=generator, dtype=torch.float64)
        labels = torch.randint(5, (8,), generator=generator)
        loss: Tensor = nn.functional.cross_entropy(call(pixel_values=images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_twenty_steps_have_torchs_losses(resnet: nn.Module) -> None:
    theirs, ours = copy.deepcopy(resnet), with_ours(resnet)
    ours_layers = [m for m in ours.modules() if type(m) is bn.BatchNorm2d]
    assert len(ours_layers) == sum(isinstance(m, nn.BatchNorm2d) for m in theirs.modules()) >= 9
    expected = losses(theirs, 20)
    assert max(expected) - min(expected) > 0.1  # it does train
    assert_close(losses(ours, 20), expected, rtol=0, atol=1e-8)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-6, atol=1e-8)
    assert ours_layers[0].num_batches_tracked == 20
    images = torch.randn(4, 3, 24, 24, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours.eval()(images).logits, theirs.eval()(images).logits, rtol=0, atol=1e-6)


def test_gradient_checkpointing_of_the_model_changes_nothing(resnet: nn.Module) -> None:
    plain, ours = with_ours(resnet), with_ours(resnet)
    for stage in ours.resnet.encoder.stages:
        forward = stage.forward
        stage.forward = lambda *args, forward=forward: torch.utils.checkpoint.checkpoint(
            forward, *args, use_reentrant=False
        )
    assert_close(losses(ours, 3), losses(plain, 3), rtol=0, atol=1e-12)
    assert_close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=1e-10, atol=1e-12)


def test_the_model_compiles_and_exports(resnet: nn.Module) -> None:
    plain, ours = with_ours(resnet), with_ours(resnet)
    torch._dynamo.reset()
    assert_close(losses(ours, 2, compiled=True), losses(plain, 2), rtol=0, atol=1e-10)
    assert_close(dict(ours.state_dict()), dict(plain.state_dict()), rtol=1e-8, atol=1e-10)
    torch._dynamo.reset()
    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    program = torch.export.export(ours.eval(), (), {"pixel_values": images})
    assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(pixel_values=images).logits, ours(images).logits)
