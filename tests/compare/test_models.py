from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm.compare import ComparisonError, models, norms

SAMPLE = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_mlp_drops_the_bias_that_beta_replaces():
    plain = models.mlp(norms.parse("none"), (1, 28, 28), 10)
    batch = models.mlp(norms.parse("batch"), (1, 28, 28), 10)
    shapes = [tuple(m.weight.shape) for m in plain if isinstance(m, nn.Linear)]
    assert shapes == [(64, 784), (128, 64), (10, 128)]
    assert [m.bias is not None for m in plain if isinstance(m, nn.Linear)] == [True, True, True]
    assert [m.bias is not None for m in batch if isinstance(m, nn.Linear)] == [False, False, True]
    order = [name for name, _ in batch.named_children()]
    assert order == ["flatten", "linear1", "norm1", "relu1", "linear2", "norm2", "relu2", "linear3"]


def test_initial_values_are_shared_where_shapes_permit():
    torch.manual_seed(0)
    first = norms.parse("none")
    values = models.initial_values(models.resolve("mlp")(first, SAMPLE, 10), first)
    norm = norms.parse("batch")
    network = models.resolve("mlp")(norm, SAMPLE, 10)
    names = models.share_initial_values(network, norm, values)
    assert names["shared"] == ["linear1.weight", "linear2.weight", "linear3.weight", "linear3.bias"]
    assert names["own"] == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
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
        (lambda norm, shape, classes: nn.Linear(3, 10), "when it was given x \\[4, 1, 28, 28\\], but it raised"),
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
        ("mlpp", "model must be mlp or module.path:callable, got 'mlpp'"),
        ("no_such_module:build", "the module of no_such_module:build must not fail .* ModuleNotFoundError"),
        ("json:lods", "must name something that json has, got no 'lods'. Did you mean load"),
        ("json:decoder", "must name a callable, got module"),
        (3, "model must be a name or a callable, got int"),
    ],
)
def test_unknown_models_are_refused_with_the_reason(name, message):
    with pytest.raises(ComparisonError, match=message):
        models.resolve(name)


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
