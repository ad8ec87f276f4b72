"""An accelerated model, whatever is done to it afterwards, computes what the original would."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.surgery.accelerate.accelerate import accelerate
from batchnorm.surgery.accelerate.fused_forward import fused_class, rewrite_of
from tests.surgery import networks
from tests.surgery.networks import network


def fast_block() -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused block, the block as it was, and an input."""
    torch.manual_seed(0)
    block = networks.BasicBlock(4, 4).double()
    fast, report = accelerate(block)
    assert len(report.fused) == 2
    return fast, block, torch.randn(4, 4, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("where", ["bn1", "bn2", "relu"])
def test_hooks_see_the_same_values(where: str) -> None:
    fast, block, x = fast_block()
    seen: dict[str, list[Tensor]] = {"fast": [], "block": []}
    for name, model in (("fast", fast), ("block", block)):
        model.get_submodule(where).register_forward_hook(lambda m, a, y, name=name: seen[name].append(y.clone()))
        model(x)
    assert len(seen["fast"]) == (2 if where == "relu" else 1)
    assert_close(seen["fast"], seen["block"])


def test_global_hooks_see_every_module() -> None:
    fast, block, x = fast_block()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        fast(x)
        ours, seen[:] = list(seen), []
        block(x)
    finally:
        handle.remove()
    assert ours == seen
    assert len(seen) == 7


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Identity(),
        lambda: nn.GroupNorm(2, 4).double(),
        lambda: nn.BatchNorm2d(4).double(),
        lambda: bn.BatchNormAct2d(4, activation="silu").double(),
    ],
    ids=["identity", "group norm", "torch's", "with activation"],
)
def test_a_layer_that_is_replaced_takes_part(other: Callable[[], nn.Module]) -> None:
    fast, block, x = fast_block()
    fast.bn2, block.bn2 = other(), other()
    assert_close(fast(x), block(x))


@pytest.mark.parametrize("other", [nn.Tanh, nn.Sigmoid, lambda: nn.GELU("tanh"), nn.GELU, nn.SiLU])
def test_an_activation_that_is_replaced_takes_part(other: Callable[[], nn.Module]) -> None:
    fast, block, x = fast_block()
    fast.relu, block.relu = other(), other()
    assert_close(fast(x), block(x))


def test_a_residual_that_broadcasts_is_added_as_before() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(self.bn(x) + y)

    block, x = Scaled().double(), torch.randn(3, 4, 5, 5).double()
    fast, report = accelerate(block)
    assert len(report.fused) == 1
    for y in (torch.randn_like(x), torch.randn_like(x[:, :, :1, :1]), x.float(), torch.tensor(2.0), 0.5):
        assert_close(fast(x, y), block(x, y))


def test_an_attribute_that_changes_counts() -> None:
    model, x = network("densenet")
    fast, _ = accelerate(model, x[:2])
    for m in (*fast.modules(), *model.modules()):
        if isinstance(m, networks.DenseLayer):
            m.drop_rate = 0.5
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert_close(fast(x), expected)
    assert not torch.equal(fast(x), expected)


def test_other_arguments_than_the_traced_ones_go_to_the_class() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
            x = F.relu(self.bn(x))
            if mask is not None:
                x = x * mask
            return x if scale == 1.0 else x * scale

    block, x, mask = Block(), torch.randn(6, 3), torch.rand(6, 3)
    fast, report = accelerate(block)
    assert len(report.fused) == 1
    for args, kwargs in [
        ((x,), {}),
        ((), {"x": x}),
        ((x, None), {"scale": 1.0}),
        ((x, mask), {}),
        ((x,), {"mask": mask, "scale": 3.0}),
    ]:
        assert_close(fast(*args, **kwargs), block(*args, **kwargs))
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        fast(x, other=1)
    with_mask, report = accelerate(block, (x, mask))
    assert len(report.fused) == 1
    assert_close(with_mask(x, mask), block(x, mask))
    assert_close(with_mask(x), block(x))


def test_slices_and_additions_of_a_sequential() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    fast, report = accelerate(model)
    assert len(report.fused) == 1
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for part in (slice(0, 2), slice(0, 3), slice(None)):
        assert_close(fast[part](x), model[part](x))
    fast.append(nn.Tanh())
    assert_close(fast(x), model(x).tanh())


def test_replicas_have_parameters_of_their_own() -> None:
    fast, _, x = fast_block()
    replica = fast._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in replica._modules.items()}
    with torch.no_grad():
        replica._modules["bn2"].bias.add_(100)
    assert replica(x).min() > 50
    assert fast(x).min() < 50


def test_torch_fx_traces_the_class() -> None:
    fast, block, x = fast_block()
    assert_close(torch.fx.symbolic_trace(fast)(x), block(x))
    model, x = network("resnet")
    fast, _ = accelerate(model, x[:2])
    assert_close(torch.fx.symbolic_trace(fast.eval())(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script.* is deprecated:DeprecationWarning:torch")
def test_it_compiles_in_one_graph_and_exports() -> None:
    model, x = network("resnet")
    fast, _ = accelerate(model, x[:2])
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), model(x))
    torch._dynamo.reset()
    program = torch.export.export(fast.eval(), (x,))
    assert_close(program.module()(x), model.eval()(x))


def test_checkpointing_counts_a_batch_once() -> None:
    fast, block, x = fast_block()
    y = torch.utils.checkpoint.checkpoint(fast, x.requires_grad_(), use_reentrant=False)
    y.sum().backward()
    gradients = [p.grad.clone() for p in fast.parameters()]
    block(x).sum().backward()
    assert_close(gradients, [p.grad for p in block.parameters()])
    assert fast.bn1.num_batches_tracked == 1


def test_state_loads_from_and_into_the_original() -> None:
    model, x = network("mobilenet")
    fast, _ = accelerate(networks.MobileNet().double(), x[:2])
    fast.load_state_dict(model.state_dict())
    assert_close(fast.eval()(x), model.eval()(x))
    other = networks.MobileNet().double()
    other.load_state_dict(fast.state_dict())
    assert_close(other.eval()(x), model.eval()(x))
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    assert list(torch.load(buffer, weights_only=True)) == list(model.state_dict())


def test_sgd_state_continues_across_it() -> None:
    """In place, in the middle of a training run, with the optimizer as it is."""

    def run(when: int | None) -> list[float]:
        torch.manual_seed(0)
        model = networks.ResNet().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        generator, losses = torch.Generator().manual_seed(1), []
        for step in range(8):
            if step == when:
                accelerate(model, inplace=True)
            x = torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_close(run(4), run(None), rtol=0, atol=1e-10)


def test_each_base_class_and_rewrite_make_one_class() -> None:
    fast, _, _ = fast_block()
    other, _, _ = fast_block()
    assert type(fast) is type(other) is fused_class(rewrite_of(fast))
