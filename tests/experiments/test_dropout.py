"""The running variance behind dropout, against what dropout does to a variance."""

import dropout
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d


@pytest.mark.parametrize("drop", [0.0, 0.2, 0.5])
def test_running_variance_over_variance_in_evaluation_is_that_of_theory(drop):
    """Dropped to keep p of x with mean c and variance v, and scaled by 1/p: (c² + v)/p - c², over v."""
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 2.0, 0.5])
    x = mean + deviation * torch.randn(200_000, 3, generator=generator)
    model = nn.Sequential(nn.Dropout(drop), BatchNorm1d(3, momentum=None)).train()
    model(x)
    keep = 1 - drop
    expected = ((mean**2 + deviation**2) / keep - mean**2) / deviation**2
    assert dropout.variance_ratios(model, x) == pytest.approx([expected.log().mean().exp().item()], rel=0.01)


def test_channels_that_are_constant_in_evaluation_are_left_out():
    model = nn.Sequential(BatchNorm1d(2, momentum=None)).train()
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    model(x)
    assert dropout.variance_ratios(model, x) == pytest.approx([1.0])


@pytest.mark.parametrize(("place", "expected"), [("nowhere", 0), ("before", 4), ("behind", 1)])
def test_dropout_stands_where_it_is_said_to(place, expected):
    layers = list(dropout.network(place, 0.5))
    places = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Dropout)]
    assert len(places) == expected
    if place == "before":
        assert all(isinstance(layers[number + 1], nn.Conv2d) for number in places)
    if place == "behind":
        assert not any(isinstance(layer, dropout.BatchNorm2d) for layer in layers[places[0] :])
