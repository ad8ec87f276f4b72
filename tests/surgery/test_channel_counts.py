"""Channel counts from NumPy, as pruning computes them: every verb takes layers that torch accepts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.doctor.pytorch.inspection import inspect_layers

X = torch.linspace(-1, 2, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)


def pruned() -> nn.Sequential:
    count = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool).sum()
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, int(count), 3), nn.BatchNorm2d(count), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )


@pytest.mark.parametrize(
    "to",
    [bn.nn, bn.SyncBatchNorm, bn.BatchRenorm, bn.FrozenBatchNorm, nn.GroupNorm, nn.LayerNorm],
)
def test_convert_there_and_back(to: Any) -> None:
    model, report = bn.convert(pruned(), to)
    assert [change.path for change in report.changed] == ["1", "4"]
    assert "BatchNorm2d(6)" in str(report)
    layer: Any = model[1]
    assert type(layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features) is int
    assert model(X).shape == (2, 4, 6, 6)
    if not isinstance(layer, nn.GroupNorm):
        assert type(bn.convert(model, torch.nn).model[1]) is nn.BatchNorm2d


def test_options_from_numpy() -> None:
    assert bn.convert(pruned(), nn.GroupNorm, num_groups=np.int64(2)).model(X).shape == (2, 4, 6, 6)
    ghost = bn.convert(pruned(), bn.GhostBatchNorm, ghost_size=np.int64(2)).model[1]
    assert type(ghost.ghost_size) is int
    assert bn.convert(pruned(), bn.DomainBatchNorm, num_domains=np.int64(2)).model[1].num_domains == 2


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: bn.accelerate(model, X),
        lambda model: bn.unfreeze(bn.freeze(model).model),
        lambda model: bn.drop_redundant_bias(model, example_inputs=X),
        lambda model: bn.insert_batchnorm(model, nn.ReLU, [X, X + 1]),
    ],
    ids=["accelerate", "freeze", "drop_redundant_bias", "insert"],
)
def test_functions_that_keep_the_output(verb: Any) -> None:
    model = pruned()
    changed, report = verb(model)
    assert report.changed
    assert_close(changed.eval()(X), model.eval()(X))


def test_fold_recalibrate_and_inspect() -> None:
    model = pruned()
    assert "2 batch normalizations" in bn.fold(model.eval(), X).report.summary()
    assert len(bn.recalibrate(model, [X, X + 1]).report.changed) == 2
    assert [facts.channels for facts in inspect_layers(model)] == [6, 4]
