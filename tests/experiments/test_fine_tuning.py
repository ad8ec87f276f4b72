"""Shifted images, and what of batch normalization still moves."""

import fine_tuning
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm2d


def test_inverting_twice_gives_the_image_back():
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(fine_tuning.shifted(fine_tuning.shifted(x, "inverted"), "inverted"), x)


def test_turning_twice_by_45_degrees_is_turning_by_90():
    around = torch.linspace(-1, 1, 27)
    smooth = torch.exp(-((around.view(-1, 1) - 0.2) ** 2 + (around - 0.4) ** 2) / 0.1).view(1, 1, 27, 27)
    twice = fine_tuning.shifted(fine_tuning.shifted(smooth, "turned"), "turned")
    quarters = [torch.rot90(smooth, turns, (2, 3)) for turns in (1, 3)]  # one way or the other
    assert min((twice - quarter).abs().max().item() for quarter in quarters) < 0.05


@pytest.mark.parametrize(
    ("arm", "statistics", "affine"),
    [("live", True, True), ("frozen", False, False), ("parameters", False, True), ("statistics", True, False)],
)
def test_what_moves(arm, statistics, affine):
    model = fine_tuning.prepared(nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm2d(2)), arm).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fine_tuning.train_to_rest(
        model.append(nn.Flatten()), torch.randn(8, 1, 4, 4), torch.arange(8), rate=0.1, batch_size=4, steps=2, seed=0
    )
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"0.weight"} <= moved
    assert ({"1.running_mean", "1.running_var"} <= moved) == statistics
    assert ({"1.weight", "1.bias"} <= moved) == affine
    assert statistics or not {"1.running_mean", "1.running_var"} & moved
    assert affine or not {"1.weight", "1.bias"} & moved
