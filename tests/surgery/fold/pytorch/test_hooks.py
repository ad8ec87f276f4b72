"""Hooks that a network needs stay in its folded copy, and in the network that other functions run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.models.data.outputs import difference

X = torch.randn(3, 3, 8, 8)


class Collects(nn.Module):
    """Collects hidden states by hooks that it installs in its first forward, as models of transformers do."""

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
        self.last = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.strict, self.installed = strict, False

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.installed:
            for block in self.blocks:
                block.register_forward_hook(_collect)
            self.installed = True
        states: list[Tensor] = []
        for block in self.blocks:
            block.states = states
            x = block(x)
        return self.last(states[-1] if self.strict else x), tuple(states)


def _collect(module: Any, args: Any, output: Tensor) -> None:
    module.states.append(output)


class Refers(nn.Module):
    """Its hook refers to the model, so that the hook of a copy writes into the original."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.states: list[Tensor] = []
        self.body.register_forward_hook(lambda module, args, output: self.states.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.states.clear()
        self.body(x)
        return self.states[-1]


def trained(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
    return model.eval()


@pytest.mark.parametrize("called", ["", "without gradients", "with gradients"])
@pytest.mark.parametrize("strict", [False, True])
def test_hooks_that_the_network_needs_stay(strict: bool, called: str) -> None:
    model = trained(Collects(strict=strict))
    with torch.set_grad_enabled(called == "with gradients"):
        expected = model(X) if called else None  # which the blocks still hold
    with torch.no_grad():
        folded, report = bn.fold(model, X)
        assert report.notes == (("2 hooks are kept, because the network needs them",) if called else ())
        assert report.before == 3
        assert report.remaining < 3
        assert difference(expected or model(X), folded(X)).relative < 1e-5
        assert difference(expected or model(X), model(X)).relative == 0.0


def test_a_hook_that_changes_the_result_stays_if_it_belongs_to_the_network() -> None:
    class Doubles(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self[0].register_forward_hook(lambda module, args, output: 2 * output)

    model = trained(Doubles())
    folded, report = bn.fold(model, X)
    assert report.notes == ("1 hook is kept, because the network needs it",)
    assert torch.allclose(folded(X), model(X), atol=1e-5)


def test_a_copy_that_does_not_work_is_not_blamed_on_the_example() -> None:
    model = trained(Refers())
    with pytest.raises(
        ValueError, match="the same as its copy, but the copy raised IndexError.* Let its hooks use the m"
    ):
        bn.fold(model, X)
    assert len(model._modules["body"]._forward_hooks) == 1
    with pytest.raises(ValueError, match="fold expects example_inputs that the model takes"):
        bn.fold(model, X[0, 0])


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: bn.diagnose(model, [X, X]),
        lambda model: bn.recalibrate(model, [X], inplace=True),
        lambda model: bn.accelerate(model, X),
        lambda model: bn.drop_redundant_bias(model, example_inputs=X),
        lambda model: bn.fold(model, X),
    ],
    ids=["diagnose", "recalibrate", "accelerate", "drop_redundant_bias", "fold"],
)
def test_hooks_that_a_network_installs_while_a_function_calls_it_stay(verb: Callable[[nn.Module], Any]) -> None:
    model = Collects(strict=True)
    result = verb(model)
    for network in (model, *(part for part in getattr(result, "__iter__", tuple)() if isinstance(part, nn.Module))):
        assert len(network(X)[1]) == 2
        hooks = [h for m in network.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert all(hook is _collect for hook in hooks)


def test_segformer() -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8], depths=[1, 1], num_attention_heads=[1, 1], decoder_hidden_size=8, num_encoder_blocks=2,
        sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        folded, report = bn.fold(model, x)
        assert report.remaining == 0
        assert difference(expected, folded(x)).relative < 1e-5
        bn.diagnose(model, [x, x])
        assert difference(expected, model(x)).relative == 0.0
