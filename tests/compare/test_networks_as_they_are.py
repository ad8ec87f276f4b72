"""Several networks of the user's own, and dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import compare
from batchnorm.compare import ComparisonError
from batchnorm.compare.inputs import models, norms

pytestmark = pytest.mark.usefixtures("no_pictures")


class Plain(nn.Module):
    def __init__(self, p: float = 0.25) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(8, 6), nn.Linear(6, 3), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.relu(self.first(x))))


class Normalized(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.relu(self.norm(self.first(x)))))


def small(data, out: Path, **options) -> compare.Result:
    options = {"batch_size": 16, "steps": 6, "seeds": 1, "progress": False, **options}
    return compare.run(data=data, out=out, **options)


def test_networks_start_from_the_same_values_and_see_the_same_batches(data, tmp_path):
    found = small(data, tmp_path, model=[Plain, Normalized], seeds=2)
    assert found.settings.grid.norm == ("as-is",)
    assert [outcome.label for outcome in found.outcomes] == ["Plain", "Normalized"]
    plain, normalized = found.runs[:2]
    assert plain.shared == normalized.shared == ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert normalized.own == ["norm.weight", "norm.bias"]
    assert [layer.name for layer in normalized.layers] == ["norm"]
    assert [(r.layer, r.stage) for r in plain.distributions] == [
        ("relu 1", stage) for stage in ("input", "normalized", "activated")
    ]
    page = found.report_path.read_text()
    assert "Networks, as they are: Plain, Normalized." in page
    assert "<dt>Parameters of Normalized not shared with the first network</dt><dd>norm.weight, norm.bias</dd>" in page
    assert "relu 1 or norm" in page
    assert any("with Normalized" in sentence and "with Plain" in sentence for sentence in found.headline)


def test_a_copy_of_a_network_trains_as_the_network_does(data, tmp_path):
    class Same(Plain):
        pass

    first, second = small(data, tmp_path, model=[Plain, Same]).runs
    assert [step.loss for step in first.steps] == [step.loss for step in second.steps]


def test_given_networks_keep_their_weights(data, tmp_path):
    torch.manual_seed(0)
    networks = {"a": Plain(), "b": Plain()}
    first, second = small(data, tmp_path, model=networks, seeds=1).runs
    assert (first.choice.model, second.choice.model) == ("a", "b")
    assert second.shared == []
    for run, network in ((first, networks["a"]), (second, networks["b"])):
        loss = F.cross_entropy(network.eval()(data.x_test), data.y_test).item()
        assert run.evaluations[0].test_loss == pytest.approx(loss, rel=1e-5)


def test_networks_and_norms_make_a_grid(data, tmp_path):
    found = small(data, tmp_path, model=["mlp", "sigmoid-mlp"], norms="none,batch")
    assert [outcome.label for outcome in found.outcomes] == [
        "mlp, none", "sigmoid-mlp, none", "mlp, batch", "sigmoid-mlp, batch"
    ]  # fmt: skip
    assert found.outcomes[3].title == "batch normalization in sigmoid-mlp"
    own = small(data, tmp_path / "own", model=Normalized, norms="as-is,none")
    assert own.outcomes[0].title == "the network's own normalization"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": [Plain, Plain]}, "the models must have different names, got 'Plain' twice"),
        ({"model": []}, "model must have at least one value, got none"),
        ({"model": ["mlp", Plain]}, "norm 'as-is' needs finished networks, but mlp is built with a norm"),
        ({"dropout": 1.0}, "dropout must be probabilities from 0 to below 1, got 1.0"),
        ({"dropout": [0.1, "x"]}, "dropout must be probabilities from 0 to below 1, got 'x'"),
        ({"model": lambda: nn.Linear(8, 3), "norms": "as-is", "dropout": 0.1}, "with dropout layers, .* has none"),
        (
            {"model": lambda norm, shape, classes: nn.Linear(8, 3), "dropout": 0.1},
            "dropout needs a model that makes its dropout layers by norm.dropout",
        ),
    ],
)
def test_unusable_networks_are_refused_with_the_reason(data, tmp_path, options, message):
    with pytest.raises(ComparisonError, match=message):
        small(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", models.MODELS)
def test_dropout_precedes_each_linear_layer_that_reads_hidden_units(name):
    x = torch.randn(4, 1, 8, 8)
    network = models.resolve(name)(norms.parse("batch", drop=0.3), x, 10)
    order = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Dropout, nn.Conv2d))]
    reading = [k for k, m in enumerate(order) if isinstance(m, nn.Linear) and k > 0]
    assert reading
    assert all(isinstance(order[k - 1], nn.Dropout) and order[k - 1].p == 0.3 for k in reading)
    assert len([m for m in order if isinstance(m, nn.Dropout)]) == len(reading)
    without = models.resolve(name)(norms.parse("batch"), x, 10)
    assert not [m for m in without.modules() if isinstance(m, nn.Dropout)]
    assert [path for path, _ in without.named_parameters()] == [path for path, _ in network.named_parameters()]


def test_probabilities_of_dropout_are_compared(data, tmp_path):
    found = small(data, tmp_path, norms="batch", dropout=[0, 0.5])
    assert [outcome.label for outcome in found.outcomes] == ["dropout 0", "dropout 0.5"]
    assert found.outcomes[1].title == "batch normalization with dropout 0.5"
    none, half = found.runs
    assert none.shared == half.shared
    assert none.evaluations[0] == half.evaluations[0]
    assert none.steps[0].loss != half.steps[0].loss
    default = small(data, tmp_path / "default", norms="batch")
    assert [step.loss for step in default.runs[0].steps] == [step.loss for step in none.steps]
    assert "Dropout with probability 0, 0.5." in found.report_path.read_text()
    more = small(data, tmp_path, norms="batch", dropout=[0, 0.5, 0.7], resume=True)
    assert more.runs[:2] == found.runs


def test_a_finished_network_gets_the_probability(data, tmp_path):
    found = small(data, tmp_path, model=Normalized, norms="as-is", dropout=[0.25, 0])
    own = small(data, tmp_path / "own", model=Normalized, norms="as-is")
    losses = [[step.loss for step in run.steps] for run in (*found.runs, *own.runs)]
    assert losses[0] == losses[2] != losses[1]


def test_a_group_of_two_widths_proposes_what_fits_both():
    def build(norm, in_shape, num_classes):
        return nn.Sequential(nn.Linear(8, 100), norm(100), nn.Linear(100, 64), norm(64), nn.Linear(64, num_classes))

    with pytest.raises(ComparisonError, match=r"divides the 64 and 100 channels, got 8\. Write group:4\.$"):
        models.resolve(build)(norms.parse("group:8"), torch.randn(4, 8), 3)
    finished = nn.Sequential(nn.Linear(8, 100), nn.BatchNorm1d(100), nn.Linear(100, 64), nn.BatchNorm1d(64))
    with pytest.raises(ComparisonError, match=r"divides the 64 and 100 channels, got 8\. Write group:4\."):
        models.resolve(nn.Sequential(finished, nn.Linear(64, 3)))(norms.parse("group:8"), torch.randn(4, 8), 3)
