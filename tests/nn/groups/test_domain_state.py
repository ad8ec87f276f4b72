"""The state of layers with domains: loaded, selected, copied and saved."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from batchnorm import BatchNorm2d
from batchnorm.nn.domain import DomainBatchNorm2d
from tests.nn.groups.test_domain import DOMAINS, make


def test_plain_batch_normalization_loads_into_every_domain() -> None:
    plain = torch.nn.BatchNorm2d(3)
    plain(torch.randn(8, 3, 4, 4) + 2)
    for affine_per_domain in (False, True):
        layer = DomainBatchNorm2d(3, num_domains=3, affine_per_domain=affine_per_domain)
        layer.load_state_dict(plain.state_dict(), strict=True)
        layer.load_state_dict(plain.state_dict(), strict=True, assign=True)
        for k in range(3):
            assert_close(layer.select(k).state_dict(), plain.state_dict(), rtol=0, atol=0)
        layer.running_mean[0] = 5.0  # rows are memory of their own
        assert (layer.running_mean[1] != 5.0).all()
        assert (plain.running_mean != 5.0).all()
    old = {key: t for key, t in plain.state_dict().items() if key != "num_batches_tracked"}
    DomainBatchNorm2d(3, num_domains=3).load_state_dict(old)  # of torch before 0.4.1


def test_plain_batch_normalization_loads_within_a_model() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ours = nn.Sequential(nn.Conv2d(3, 4, 1), DomainBatchNorm2d(4, num_domains=2))
    given = plain.state_dict()
    assert ours.load_state_dict(given, strict=True).missing_keys == []
    assert given["1.running_mean"].shape == (4,)


def test_a_checkpoint_of_other_domains_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        DomainBatchNorm2d(3, num_domains=2).load_state_dict(make().state_dict())


@pytest.mark.parametrize("affine_per_domain", [False, True], ids=["shared", "per_domain"])
def test_select_gives_a_plain_layer_of_its_own(affine_per_domain: bool) -> None:
    layer = make(momentum=0.3, eps=1e-3, on_nonfinite="skip", affine_per_domain=affine_per_domain).eval()
    layer.bias.requires_grad_(False)
    one = layer.select(1)
    assert type(one) is BatchNorm2d
    assert (one.momentum, one.eps, one.on_nonfinite, one.training) == (0.3, 1e-3, "skip", False)
    assert (one.weight.requires_grad, one.bias.requires_grad, one.weight.dtype) == (True, False, torch.float64)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert_close(one(x), layer(x, 1))
    one.running_mean.fill_(7.0)
    assert (layer.running_mean != 7.0).all()


def test_copies_and_pickles_and_saves() -> None:
    layer, x = make(affine_per_domain=True), torch.randn(9, 3, 2, 2, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    loaded = DomainBatchNorm2d(3, num_domains=3, affine_per_domain=True, dtype=torch.float64)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded)
    y = layer(x, DOMAINS)
    for other in others:
        assert torch.equal(other(x, DOMAINS), y)
        assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
