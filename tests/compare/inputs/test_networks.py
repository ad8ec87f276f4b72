"""The networks that are compared by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs import models, norms
from batchnorm.compare.inputs.networks import MODELS, mlp, resnet20, sigmoid_mlp, vgg

IMAGES = [name for name in MODELS if not name.endswith("mlp")]


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))


def built(name: str, spec: str, placement: str = "before", shape: tuple[int, ...] = (1, 8, 8)) -> nn.Module:
    torch.manual_seed(0)
    return models.resolve(name)(norms.parse(spec, placement), batch(*shape), 10)


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize(
    "spec",
    ["none", "batch", "renorm:rmax=3,dmax=5", "ghost:2", "sync", "decorrelated:8", "group:8", "layer", "instance"],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_network_trains_with_each_norm_in_each_placement(name: str, spec: str, placement: str) -> None:
    flat = name.endswith("mlp") or name == "vgg"  # with a hidden layer that has no positions
    groups = {"sigmoid-mlp": "group:10"}
    if spec == "instance" and flat:
        with pytest.raises(ComparisonError, match="instance normalization expects x of shape .* with positions"):
            built(name, spec, placement)
        return
    network = built(name, groups.get(name, spec) if spec == "group:8" else spec, placement)
    network(batch(1, 8, 8)).square().sum().backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), path


@pytest.mark.parametrize("name", MODELS)
def test_both_placements_have_the_same_normalizations_in_another_order(name: str) -> None:
    before, after = (built(name, "layer", placement) for placement in ("before", "after"))
    assert {path: p.shape for path, p in before.named_parameters()} == {
        path: p.shape for path, p in after.named_parameters()
    }
    orders = [
        {tuple(part for part, _ in module.named_children()) for module in network.modules() if hasattr(module, "norm")}
        for network in (before, after)
    ]
    assert orders == [{("norm", "activation")}, {("activation", "norm")}]


@pytest.mark.parametrize("name", MODELS)
def test_a_bias_before_a_normalization_is_left_out(name: str) -> None:
    def biases(network: nn.Module) -> list[bool]:
        return [m.bias is not None for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    *hidden, output = biases(built(name, "batch"))
    assert not any(hidden) and output
    assert all(biases(built(name, "none")))
    assert all(biases(built(name, "batch", "after")))


@pytest.mark.parametrize(("name", "shape"), [(name, (c, s, s)) for name in IMAGES for c, s in ((1, 28), (3, 32))])
def test_image_networks_take_images_of_any_channels_and_size(name: str, shape: tuple[int, ...]) -> None:
    assert built(name, "batch", shape=shape)(batch(*shape)).shape == (4, 10)


@pytest.mark.parametrize("shape", [(784,), (2, 16), (1, 8, 8, 8), (1, 4, 28)])
@pytest.mark.parametrize("name", IMAGES)
def test_samples_that_are_not_images_are_refused(name: str, shape: tuple[int, ...]) -> None:
    if shape == (1, 4, 28) and name != "vgg":
        assert built(name, "none", shape=shape)(batch(*shape)).shape == (4, 10)
        return
    with pytest.raises(ComparisonError, match=rf"{name} needs images \[N, C, H, W\].* got samples of shape \[.*Choose"):
        built(name, "none", shape=shape)


@pytest.mark.parametrize("name", MODELS)
def test_groups_that_do_not_divide_the_channels_are_refused(name: str) -> None:
    """The proposal fits every layer."""
    with pytest.raises(ComparisonError, match=r"that divides the .*\d+ channels, got 24\. Write (group:\d+)") as raised:
        built(name, "group:24")
    proposed = re.findall(r"group:\d+", str(raised.value))[1:]
    assert proposed
    for spec in proposed:
        built(name, spec)


def test_mlp_has_the_documented_layers() -> None:
    network = mlp(norms.parse("batch"), (1, 28, 28), 10)
    assert [name for name, _ in network.named_children()] == [
        "flatten", "linear1", "hidden1", "dropout1", "linear2", "hidden2", "dropout2", "linear3"
    ]  # fmt: skip
    assert [tuple(m.weight.shape) for m in network if isinstance(m, nn.Linear)] == [(64, 784), (128, 64), (10, 128)]


def test_sigmoid_mlp_is_the_network_of_the_paper() -> None:
    torch.manual_seed(0)
    network = sigmoid_mlp(norms.parse("none"), (1, 28, 28), 10)
    linear = [m for m in network if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert linear[0].weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not any(m.bias.any() for m in linear)
    assert sum(isinstance(m, nn.Sigmoid) for m in network.modules()) == 3


def test_resnet20_has_the_layers_of_the_paper() -> None:
    """0.27 million parameters for 3 channels (He et al. 2016, table 6), and shortcuts without any."""
    network = resnet20(norms.parse("batch"), (3, 32, 32), 10)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    assert [m.out_channels for m in convolutions] == [16] * 7 + [32] * 6 + [64] * 6
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 0.27
    assert network[:-4](batch(3, 32, 32)).shape == (4, 64, 8, 8)


def test_a_block_adds_its_input_padded_with_zeros() -> None:
    network = resnet20(norms.parse("none"), (1, 8, 8), 10)
    block = network.get_submodule("block2_1")
    nn.init.zeros_(block.conv2.weight)
    x = batch(16, 8, 8)
    y = block(x)
    torch.testing.assert_close(y[:, :16], x[:, :, ::2, ::2].relu())
    assert not y[:, 16:].any()


def test_vgg_has_two_convolutions_in_each_stage() -> None:
    network = vgg(norms.parse("batch"), (1, 28, 28), 10)
    assert [m.out_channels for m in network if isinstance(m, nn.Conv2d)] == [16, 16, 32, 32, 64, 64]
    assert [tuple(m.weight.shape) for m in network if isinstance(m, nn.Linear)] == [(128, 64 * 9), (10, 128)]
