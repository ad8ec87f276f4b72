"""Frozen layers of other libraries are recognized by what they hold and compute, and nothing else is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.foreign import foreign_eps
from batchnorm.walk import eps_of, is_batch_norm, is_frozen, norm_layers, num_channels, uses_batch
from tests.foreign_layers import FOREIGN, Detectron2, Detr, Torchvision, _FourBuffers, drawn


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_library_is_recognized(name: str, device: str) -> None:
    layer = FOREIGN[name](5).to(device).train()
    before = copy.deepcopy(dict(vars(layer)))
    assert is_batch_norm(layer)
    assert is_frozen(layer)
    assert not uses_batch(layer)
    assert num_channels(layer) == 5
    assert eps_of(layer) == (0.0 if name == "maskrcnn" else 1e-5)
    assert vars(layer).keys() == before.keys()
    assert [found.path for found in norm_layers(nn.Sequential(nn.ReLU(), layer))] == ["1"]


def test_the_attribute_is_the_epsilon_of_each_layer() -> None:
    assert [foreign_eps(kind(3, eps)) for kind in (Torchvision, Detectron2) for eps in (1e-3, 0.0, 1)] == [
        1e-3, 0.0, 1.0, 1e-3, 0.0, 1.0,
    ]  # fmt: skip


def test_layers_of_the_transformers_library() -> None:
    pytest.importorskip("transformers")
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrFrozenBatchNorm2d
    from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d
    from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

    for kind in (DetrFrozenBatchNorm2d, RTDetrFrozenBatchNorm2d, DeformableDetrFrozenBatchNorm2d):
        assert foreign_eps(drawn(kind(3))) == 1e-5


class Other(_FourBuffers):
    """Another formula."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalized(x, 1e-5) * 1.001


class Moves(_FourBuffers):
    """Updates its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalized(x, 1e-5)
        self.running_mean.add_(0.1)
        return y


class ByMode(_FourBuffers):
    """Normalizes by the batch in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(
            x, None if self.training else self.running_mean, None if self.training else self.running_var,
            self.weight, self.bias, self.training,
        )  # fmt: skip


class Fails(_FourBuffers):
    """Takes something else."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


class WithParameter(Detr):
    """Holds more."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.gain = nn.Parameter(torch.ones(1))


def with_forward() -> nn.Module:
    layer = Detr(3)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: Other(3), lambda: Moves(3), lambda: ByMode(3), lambda: Fails(3), lambda: WithParameter(3), with_forward,
        lambda: nn.Sequential(Detr(3)), lambda: nn.ReLU(), lambda: torch.jit.script(nn.ReLU()),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_anything_else_is_not(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert foreign_eps(layer) is None
    assert not is_batch_norm(layer)
    assert not is_frozen(layer)


class Optional(_FourBuffers):
    """The formula, and an activation or another ε by the object's options."""

    def __init__(self, num_features: int, mode: str | bool | Callable[[Tensor], Tensor]) -> None:
        super().__init__(num_features)
        self.mode, self.eps = mode, 1e-3

    def forward(self, x: Tensor) -> Tensor:
        y = self.normalized(x, 1e-5 if self.mode is True else self.eps)
        return F.relu(y) if self.mode == "relu" else self.mode(y) if callable(self.mode) else y


@pytest.mark.parametrize("channels", [1, 8])
def test_objects_of_one_class_are_told_apart_by_their_options(channels: int) -> None:
    found = [foreign_eps(Optional(channels, mode)) for mode in ("none", "relu", F.silu, F.hardtanh, False, True)]
    assert found == [1e-3, None, None, None, 1e-3, 1e-5]


def test_looking_changes_neither_the_random_state_nor_the_layer() -> None:
    class Fresh(Detr):
        """Not looked at before."""

    layer = drawn(Fresh(3))
    called: list[object] = []
    layer.register_forward_hook(lambda *args: called.append(args))
    state, seed = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    assert foreign_eps(layer) == 1e-5
    assert not called
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
