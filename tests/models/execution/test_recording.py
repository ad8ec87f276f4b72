from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.execution.recording import fewer_samples


class Clips(nn.Module):
    """The first axis holds the frames of clips of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)).relu().mean((2, 3))).view(-1, 4, 2).mean(1)


class Triplets(nn.Module):
    """The first axis holds anchors, positives and negatives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        anchor, positive, negative = self.norm(self.linear(x)).reshape(3, -1, 4)
        return (anchor - positive).norm(dim=1) - (anchor - negative).norm(dim=1)


class Graph(nn.Module):
    """The first axis holds the nodes of one graph, also in the dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.norm(adjacency @ self.linear(x))


class TimeFirst(nn.Module):
    """The first axis holds time steps, which the network mixes: it accepts fewer, with other results."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.norm = nn.LSTM(5, 4, bidirectional=True), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        states = self.recurrent(x)[0]
        return self.norm(states.transpose(1, 2)).transpose(1, 2)


class Images(nn.Module):
    """A list of images: the first axis holds their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.norm(self.conv(torch.stack(images)))


MIXING: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "clips": (Clips(), (torch.randn(8, 3, 6, 6),)),
    "triplets": (Triplets(), (torch.randn(9, 5),)),
    "graph": (Graph(), (torch.randn(6, 5), torch.rand(6, 6))),
    "time": (TimeFirst(), (torch.randn(7, 3, 5),)),
    "images": (Images(), (list(torch.randn(4, 3, 6, 6)),)),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_example_whose_first_axis_is_not_samples_is_kept_whole(name: str) -> None:
    model, example = MIXING[name]
    inputs = Inputs.of(example)
    assert fewer_samples(model.eval(), inputs, 2) == (inputs, None)


@pytest.mark.parametrize("name", MIXING)
def test_fold_and_diagnose_take_an_example_whose_first_axis_is_not_samples(name: str) -> None:
    model, example = MIXING[name]
    model.eval()
    folded, report = bn.fold(model, example)
    assert report.before == 1
    assert torch.allclose(folded(*example), model(*example), atol=1e-5)
    diagnosis = bn.diagnose(model, [example] * 2)
    assert not any("called again" in rule.reason for rule in diagnosis.not_checked)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0, 1)),  # [N·C, H, W]
        nn.Sequential(nn.Flatten(1, 2)),
    ],
)
def test_independent_samples_are_cut(model: nn.Module, known: bool) -> None:
    inputs = Inputs.of(torch.randn(5, 3, 6, 6))
    model.eval()
    results = [model(*inputs.args).detach()] if known else None
    few, result = fewer_samples(model, inputs, 2, results)
    assert few.args[0].shape == (2, 3, 6, 6)
    assert torch.equal(result, model(*few.args))
    assert fewer_samples(model, few, 2) == (few, None)


def test_a_folded_network_of_clips_takes_other_numbers_of_clips() -> None:
    class Decides(Clips):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.dim() == 4 else super().forward(x[None])  # not traceable by torch.fx

    model = Decides().eval()
    folded, report = bn.fold(model, torch.randn(4, 3, 6, 6))
    x = torch.randn(12, 3, 6, 6)
    assert report.remaining == 0
    assert torch.allclose(folded(x), model(x), atol=1e-5)
