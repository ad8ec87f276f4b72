from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs import models, norms

SAMPLE = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_initial_values_are_shared_where_shapes_permit():
    torch.manual_seed(0)
    first = norms.parse("none")
    values = models.initial_values(models.resolve("mlp")(first, SAMPLE, 10), first)
    norm = norms.parse("batch")
    network = models.resolve("mlp")(norm, SAMPLE, 10)
    names = models.share_initial_values(network, norm, values)
    assert names["shared"] == ["linear1.weight", "linear2.weight", "linear3.weight", "linear3.bias"]
    assert names["own"] == [
        "hidden1.norm.weight", "hidden1.norm.bias", "hidden2.norm.weight", "hidden2.norm.bias"
    ]  # fmt: skip
    for name in names["shared"]:
        assert torch.equal(network.get_parameter(name), values[name])


def test_lazy_parameters_are_made_before_values_are_shared():
    def build(norm, in_shape, num_classes):
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(5), norm(5), nn.ReLU(), nn.LazyLinear(num_classes))

    norm = norms.parse("batch")
    network = models.resolve(build)(norm, SAMPLE, 10)
    assert len(models.initial_values(network, norm)) == 4
    assert network.training


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda norm, shape, classes: 1 / 0, "raised ZeroDivisionError: division by zero \\(test_models.py, line"),
        (lambda norm, shape, classes: "net", "must return a torch.nn.Module, got str"),
        (lambda norm: None, "raised TypeError"),
        (lambda norm, shape, classes: nn.Linear(3, 10), "when it was given x \\[4, 1, 28, 28\\], but raised"),
        (lambda norm, shape, classes: nn.Flatten(), "must return class scores of shape \\[4, 10\\], got \\[4, 784\\]"),
        (lambda norm, shape, classes: Selects(), "must have parameters to train, got none"),
    ],
)
def test_unusable_callables_are_refused_with_the_reason(build, message):
    with pytest.raises(ComparisonError, match=message):
        models.resolve(build)(norms.parse("none"), SAMPLE, 10)


class Selects(nn.Module):
    """Has nothing to train."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlpp", "model must be mlp, sigmoid-mlp, cnn, resnet20, vgg or module.path:callable, got 'mlpp'"),
        ("net:build/", "or module.path:callable, got 'net:build/'"),
        ("no_such_module:build", "the module of no_such_module:build must run without errors .* ModuleNotFoundError"),
        ("json:lods", "must name an object that exists, but json has no 'lods'. Did you mean load"),
        ("json:decoder", "must name a callable, got module"),
        (3, "model must be a name or a callable, got int"),
    ],
)
def test_unknown_models_are_refused_with_the_reason(name, message):
    with pytest.raises(ComparisonError, match=message):
        models.resolve(name)


def plain(norm, in_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), norm(8), nn.ReLU(), nn.Linear(8, num_classes))


def test_placement_after_needs_normalization_and_activation_together():
    model = models.resolve(plain)
    model(norms.parse("batch"), SAMPLE, 10)
    for spec in ("batch", "none"):
        with pytest.raises(
            ComparisonError, match="by norm.activated, got plain, which makes 1 by norm alone. Write norm.activated"
        ):
            model(norms.parse(spec, "after"), SAMPLE, 10)


def test_what_a_norm_made_before_is_forgotten():
    norm = norms.parse("batch", "after")
    models.resolve("mlp")(norm, SAMPLE, 10)
    network = models.resolve("mlp")(norm, SAMPLE, 10)
    assert norm.made == [network.hidden1.norm, network.hidden2.norm]
    with pytest.raises(ComparisonError, match="placement after needs"):
        models.resolve(plain)(norm, SAMPLE, 10)


@pytest.mark.parametrize("shape", [(5,), (3, 6), (3, 4, 4), (3, 2, 4, 4)])
def test_the_input_norm_does_what_standardizing_does(shape):
    x = 100 + 50 * torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))
    network = models.with_input_norm(nn.Identity(), shape)
    y = network(x)
    axes = [0, *range(2, x.dim())]
    torch.testing.assert_close(y.mean(axes), torch.zeros(shape[0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var(axes, unbiased=False), torch.ones(shape[0]), atol=1e-4, rtol=0)
    assert list(network.parameters()) == []
    assert list(dict(network.named_children())) == ["input_norm", "network"]


def test_the_input_norm_refuses_more_axes():
    with pytest.raises(ComparisonError, match=r"takes samples .* got shape \[1, 2, 3, 4, 5\]"):
        models.with_input_norm(nn.Identity(), (1, 2, 3, 4, 5))


def test_a_callable_is_found_in_the_working_directory(tmp_path: Path, monkeypatch):
    (tmp_path / "my_net_of_tests.py").write_text("def build(norm, in_shape, num_classes):\n    return 'made'\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    try:
        model = models.resolve("my_net_of_tests:build")
    finally:
        sys.modules.pop("my_net_of_tests", None)
    assert model.build(None, (), 1) == "made"
    assert sys.path == path
