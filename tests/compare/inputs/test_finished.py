"""A network that is finished, with the norms of a comparison in place of its batch normalization."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import nn as ours
from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs import models, norms

SAMPLE = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def finished() -> nn.Sequential:
    """Takes no argument; its layers have settings of their own."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=1e-3, momentum=0.01),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.BatchNorm1d(16, affine=False),
        nn.Linear(16, 10),
    )


def trained() -> nn.Sequential:
    torch.manual_seed(3)
    network = finished()
    network(SAMPLE)
    nn.init.uniform_(network[1].weight)
    return network


def with_norm(model: models.AnyModel, spec: str) -> tuple[nn.Module, norms.Norm]:
    torch.manual_seed(0)
    norm = norms.parse(spec)
    return models.resolve(model)(norm, SAMPLE, 10), norm


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("none", (nn.Identity, nn.Identity)),
        ("batch", (ours.BatchNorm2d, ours.BatchNorm1d)),
        ("renorm:rmax=2,dmax=1", (ours.BatchRenorm2d, ours.BatchRenorm1d)),
        ("ghost:2", (ours.GhostBatchNorm2d, ours.GhostBatchNorm1d)),
        ("sync", (ours.SyncBatchNorm, ours.SyncBatchNorm)),
        ("decorrelated:4", (ours.DecorrelatedBatchNorm2d, ours.DecorrelatedBatchNorm1d)),
        ("group:4", (nn.GroupNorm, nn.GroupNorm)),
        ("layer", (nn.GroupNorm, nn.GroupNorm)),
    ],
)
def test_each_norm_takes_the_place_of_batch_normalization(spec: str, kinds: tuple[type, type]) -> None:
    network, norm = with_norm(finished, spec)
    assert (type(network[1]), type(network[5])) == kinds
    assert norm.made == [network[1], network[5]]
    assert network.training
    network(SAMPLE).square().sum().backward()
    torch.manual_seed(0)
    for (name, initial), (_, parameter) in zip(
        finished()[0].named_parameters(), network[0].named_parameters(), strict=True
    ):
        assert torch.equal(initial, parameter), name


def test_variants_keep_the_settings_of_the_layers_unless_options_override_them() -> None:
    original = trained()
    before = copy.deepcopy(original.state_dict())
    for spec, eps, momentum in (("batch", 1e-3, 0.01), ("renorm:momentum=0.5", 1e-3, 0.5), ("batch:0.25", 0.25, 0.01)):
        network, _ = with_norm(original, spec)
        assert (network[1].eps, network[1].momentum) == (eps, momentum)
        assert network[5].weight is None
        for name in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(getattr(network[1], name), before[f"1.{name}"]), name
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_another_norm_copies_γ_and_β() -> None:
    original = trained()
    network, _ = with_norm(original, "group:4")
    assert torch.equal(network[1].weight, original[1].weight)
    assert network[1].weight is not original[1].weight


def test_batch_on_our_own_layers_leaves_them() -> None:
    network, norm = with_norm(lambda: nn.Sequential(nn.Flatten(), ours.BatchNorm1d(64), nn.Linear(64, 10)), "batch")
    assert norm.made == [network[1]]


def test_lazy_layers_are_made_first() -> None:
    network, _ = with_norm(lambda: nn.Sequential(nn.Flatten(), nn.LazyBatchNorm1d(), nn.LazyLinear(10)), "layer")
    assert network[1].num_channels == 64


def test_a_shared_layer_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.BatchNorm1d(64)
            self.linear = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.second(self.first(x.flatten(1)).relu()))

    network, norm = with_norm(Twice, "group:4")
    assert network.first is network.second is norm.made[0]
    assert len(norm.made) == 1


def test_finished_networks_are_distinguished_from_builders(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_nets_of_tests.py").write_text(
        "from torch import nn\n"
        "def build(norm, in_shape, num_classes=10): ...\n"
        "def make(width=16, **options): ...\n"
        "network = nn.Sequential(nn.BatchNorm1d(3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.modules", {**__import__("sys").modules})
    found = {name: models.resolve(f"my_nets_of_tests:{name}") for name in ("build", "make", "network")}
    assert {name: (model.finished, model.pretrained) for name, model in found.items()} == {
        "build": (False, False),
        "make": (True, False),
        "network": (True, True),
    }
    assert not models.resolve(lambda *arguments: None).finished
    assert not models.resolve(lambda norm=None, in_shape=(), num_classes=10: None).finished
    assert models.resolve(nn.Identity).finished


class Scaled(nn.BatchNorm1d):
    """Does more than batch normalization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def of(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), layer, nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        (
            of(nn.Identity()),
            "batch",
            "Sequential is a finished network, .* got a Sequential without any. Write a callable",
        ),
        (of(Scaled(64)), "batch", "norm 'batch' must be able .* but cannot at 1: its class Scaled has its own forward"),
        (of(Scaled(64)), "none", "norm 'none' must be able .* but cannot at 1: its class Scaled has its own forward"),
        (of(nn.BatchNorm1d(64)), "group:7", "a number of groups that divides the 64 channels, got 7"),
        (of(ours.BatchNormAct1d(64, activation="relu")), "layer", "BatchNormAct1d contains an activation"),
        (of(ours.BatchNormAct1d(64, activation="relu")), "ghost:2", "cannot at 1: it also adds a residual"),
        (of(nn.BatchNorm1d(63)), "batch", "Sequential must run without errors when it was given x \\[6, 1, 8, 8\\]"),
        (
            lambda: 1 / 0,
            "batch",
            "must run without errors when it was called without arguments, but raised ZeroDivisionError",
        ),
        (lambda: "net", "batch", "must return a torch.nn.Module, got str. It is called as callable\\(\\)"),
        (lambda: of(nn.BatchNorm1d(64))[:2], "batch", "must return class scores of shape \\[6, 10\\], got \\[6, 64\\]"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(model, spec: str, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        with_norm(model, spec)


def test_an_activation_within_is_kept_by_batch() -> None:
    network, _ = with_norm(of(ours.BatchNormAct1d(64, activation="relu")), "batch")
    assert network[1].activation == "relu"


def test_placement_after_needs_a_model_that_is_built() -> None:
    norm = norms.parse("batch", "after")
    with pytest.raises(ComparisonError, match="placement after needs a model that builds .* got the finished finished"):
        models.resolve(finished)(norm, SAMPLE, 10)
