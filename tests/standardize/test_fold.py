"""The Standardizer's layer, folded into the network behind it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm.standardize import Standardizer
from batchnorm.surgery.fold import fold
from batchnorm.surgery.fold.pytorch.counting import count_batch_norms

IMAGES = torch.randint(256, (8, 3, 6, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", [0, 1])
def test_the_layer_folds_into_the_first_convolution(padding: int) -> None:
    torch.manual_seed(0)
    x = IMAGES.double()
    behind = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.BatchNorm2d(4), nn.ReLU()).double()
    standardizer = Standardizer().fit(IMAGES)
    model = nn.Sequential(standardizer.to_layer(dtype=torch.float64), behind).eval()
    folded, report = fold(model, (x,))
    assert count_batch_norms(model, (x,)).batch_norm == 2 and count_batch_norms(folded, (x,)).batch_norm == 0
    assert not report.left
    assert_close(folded(x), behind(standardizer.transform(x)), rtol=1e-10, atol=1e-10)


def test_the_layer_folds_into_the_first_linear_layer() -> None:
    torch.manual_seed(0)
    x = IMAGES.flatten(1).double()
    standardizer, behind = Standardizer().fit(x), nn.Linear(108, 4).double()
    folded, report = fold(nn.Sequential(standardizer.to_layer(dtype=torch.float64), behind).eval(), (x,))
    assert count_batch_norms(folded, (x,)).batch_norm == 0 and not report.left
    assert_close(folded(x), behind(standardizer.transform(x)), rtol=1e-10, atol=1e-10)
