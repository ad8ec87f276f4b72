"""The choice of layers, as with `only=`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.models.selection import select
from batchnorm.walk import norm_layers


def network() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))


@pytest.mark.parametrize(
    ("choice", "paths"),
    [
        (None, "0123"),
        ("[12]", "12"),
        (["3", "0"], "03"),
        (nn.BatchNorm1d, "1"),
        ((nn.BatchNorm1d, nn.BatchNorm2d), "0123"),
        (lambda path, layer: path == "2", "2"),
        (nn.Conv2d, ""),
    ],
)
def test_layers_are_chosen_by_path_class_or_predicate_in_their_order(choice: Any, paths: str) -> None:
    assert [found.path for found in select("f", norm_layers(network()), choice)] == list(paths)


def test_every_pattern_must_match() -> None:
    text = r"f expects `after` to match a layer, got 'head.\*', which matches none of 4. Choose from: 0, 1, 2, ...\."
    with pytest.raises(ValueError, match=text):
        select("f", norm_layers(network()), ["0", "head.*"], argument="after")


@pytest.mark.parametrize("choice", [3, [3], b"0", nn.ReLU(), nn.Sequential(nn.ReLU()), ["0", nn.BatchNorm2d]])
def test_anything_else_is_refused(choice: Any) -> None:
    with pytest.raises(TypeError, match=r"f expects `only` to be a pattern, .*, got .*\. Pass paths, such as 0, 1, 2"):
        select("f", norm_layers(network()), choice)


def test_patterns_may_come_from_a_generator() -> None:
    data = [torch.rand(4, 3)]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    _, report = bn.recalibrate(model, data, only=(str(i) for i in range(1)))
    assert [change.path for change in report.changed] == ["0"]


def test_convert_takes_a_class() -> None:
    model, report = bn.convert(network(), to="FrozenBatchNorm", only=nn.BatchNorm1d)
    assert [change.path for change in report.changed] == ["1"] and isinstance(model[1], bn.FrozenBatchNorm1d)
