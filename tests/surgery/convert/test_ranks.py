"""Layers that take any rank become layers of the rank that an example, or the modules next to them, show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import batchnorm as bn
from batchnorm import convert


class Block(nn.Module):
    """The forward of a residual block, whose layers are not in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.pre = nn.BatchNorm1d(6), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.linear, self.inner = nn.Linear(4, 6), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.relu(self.first(self.inner(F.relu(self.pre(x)))))
        return self.last(self.linear(x.mean((2, 3))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), Block())


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
PATHS = ("2", "3.last", "3.first", "3.pre")


def names(model: nn.Module) -> list[str]:
    return [type(model.get_submodule(path)).__name__ for path in PATHS]


@pytest.fixture(params=["torch", "ours", "any rank"])
def synchronized(request: pytest.FixtureRequest) -> nn.Module:
    """A network with layers of any rank that remember no other."""
    model = network()
    kind = {"torch": nn.SyncBatchNorm, "ours": bn.SyncBatchNorm, "any rank": bn.BatchNorm}[request.param]
    for path in PATHS:
        layer = kind(model.get_submodule(path).num_features)
        layer.load_state_dict(model.get_submodule(path).state_dict())
        model.set_submodule(path, layer)
    return model.eval()


@pytest.mark.parametrize("example", [None, X], ids=["neighbours", "example"])
def test_synchronized_layers_find_their_rank(synchronized: nn.Module, example: Tensor | None) -> None:
    model = convert(synchronized, "BatchRenorm", example_inputs=example).model
    assert names(model) == ["BatchRenorm2d", "BatchRenorm1d", "BatchRenorm2d", "BatchRenorm2d"]
    assert_close(convert(model, "BatchNorm").model(X), synchronized(X))


def test_a_class_of_one_rank_leaves_the_others(synchronized: nn.Module) -> None:
    model, report = convert(synchronized, nn.BatchNorm2d)
    assert [name == "BatchNorm2d" for name in names(model)] == [True, False, True, True]
    assert "it takes other inputs (1d) than BatchNorm2d" in str(report)
    assert_close(model(X), synchronized(X))


@pytest.mark.parametrize(
    ("rank", "shape"), [("1d", (4, 3)), ("1d", (4, 3, 5)), ("2d", (2, 3, 4, 4)), ("3d", (2, 3, 2, 2, 2))]
)
def test_an_example_shows_every_rank(rank: str, shape: tuple[int, ...]) -> None:
    layer = nn.SyncBatchNorm(3)
    x = torch.randn(shape)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    assert type(convert(layer, "BatchRenorm", example_inputs=x).model).__name__ == f"BatchRenorm{rank}"
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)
    assert layer.training


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Flatten(1), nn.SyncBatchNorm(3)),
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(1), nn.SyncBatchNorm(3)),
        nn.ModuleList([nn.Conv2d(3, 3, 1), nn.SyncBatchNorm(3)]),
        nn.SyncBatchNorm(3),
    ],
)
def test_without_a_sign_the_layer_takes_any_rank(model: nn.Module) -> None:
    new = convert(model, "BatchRenorm").model
    assert [type(found) for found in new.modules() if isinstance(found, nn.modules.batchnorm._NormBase)] == [
        bn.BatchRenorm
    ]


def test_a_wrong_example_is_refused() -> None:
    with pytest.raises(ValueError, match="convert expects example_inputs that Sequential takes"):
        convert(network(), "BatchRenorm", example_inputs=torch.randn(2, 5))
