"""The data that `recalibrate` reads: batches of every kind, forwards, masks, limits, and errors."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.models.data.batches import ThreadSettings
from batchnorm.recalibration import recalibrate
from tests.recalibration.models import batches, network


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.bn((a + b) * scale)


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


A, B = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[10.0], [20.0], [30.0]])


@pytest.mark.parametrize(
    "batch",
    [
        (A, B),
        [A, B, "labels"],
        Pair(A, B),
        {"a": A, "b": B, "labels": A},
        OrderedDict(b=B.numpy(), a=A),
        (A.numpy(), B.numpy()),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "ordered-dict", "arrays"],
)
def test_batches_of_every_kind_reach_the_model(batch: Any) -> None:
    before = copy.copy(batch)
    found, report = recalibrate(Two(), [batch])
    assert found.bn.running_mean.item() == 23.0
    assert (report.samples, report.batches) == (3, 1)
    assert type(batch) is type(before) and all(a is b for a, b in zip(batch, before, strict=True))


def test_batches_that_know_how_to_move_move_themselves() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
    found, _ = recalibrate(nn.BatchNorm1d(1), [packed], forward=lambda model, x: model(x.data))
    assert found.running_mean.item() == 3.0


def test_forward_calls_the_model_as_the_user_does() -> None:
    found, _ = recalibrate(Two(), [{"x": [A, B]}], forward=lambda model, batch: model(*batch["x"], scale=2.0))
    assert found.bn.running_mean.item() == 46.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (A, "an iterable of batches, got one Tensor of shape \\[3, 1\\]. Pass \\[x\\]"),
        ({"a": A}, "an iterable of batches, got dict"),
        (3, "an iterable of batches, got int"),
        ([(A,)], "at least 2 items, because Two.forward requires \\(a, b\\), got 1"),
        ([{"a": A}], "with the keys that Two.forward requires \\(a, b\\), got 'a'"),
        (["text"], "tensors, tuples, lists or dicts, got str. Pass forward="),
    ],
)
def test_data_that_do_not_fit_are_refused(data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        recalibrate(Two(), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": "twice"}, "passes to be one of 'single', 'sequential', got 'twice'"),
        ({"shared": "both"}, "shared to be one of"),
        ({"prior": -1.0}, "prior >= 0"),
        ({"prior": float("inf")}, "finite prior >= 0"),
        ({"max_samples": 0}, "max_samples >= 1"),
        ({"cache_bytes": -1}, "cache_bytes >= 0"),
        ({"only": "head.*"}, "got 'head.\\*', which matches none of 3. Choose from: 1, 5, 8"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalibrate(network(), batches(), **options)


def test_max_samples_stops_after_the_batch_that_reaches_it() -> None:
    endless = itertools.cycle(batches())
    _, report = recalibrate(network(), endless, max_samples=20)
    assert (report.samples, report.batches) == (23, 2)


@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("ambient", [True, False])
def test_autocast_reaches_every_pass(passes: str, ambient: bool) -> None:
    dtypes = set()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        y = model[0](x)
        dtypes.add(y.dtype)
        return model[1:](y)

    with torch.autocast("cpu", torch.bfloat16, enabled=ambient):
        recalibrate(network(), batches(), forward=forward, passes=passes, autocast=None if ambient else torch.bfloat16)
    assert dtypes == {torch.bfloat16}


def test_the_default_device_reaches_other_threads() -> None:
    with torch.device("meta"):
        ambient = ThreadSettings(None, None)
    devices = []

    def work() -> None:
        with ambient.entered():
            devices.append(torch.empty(0).device.type)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert devices == ["meta"]


def test_batches_move_to_the_device() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="meta tensors"):  # the batch went to the model's device, meta
        recalibrate(model, [torch.rand(4, 3)], device="meta")
    found, _ = recalibrate(model, [np.ones((4, 3), np.float32), np.zeros((4, 3), np.float32)])
    assert_close(found[1].running_mean, torch.full((3,), 0.5))


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_masked_values_do_not_count(passes: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).double()
    lengths = torch.tensor([5, 2, 7, 4])
    mask = torch.arange(7) < lengths[:, None]
    x = torch.randn(4, 3, 7).double()
    padded = torch.where(mask[:, None], x, 99.0)
    packed = x.transpose(1, 2)[mask].T[None]  # [1, 3, sum of lengths]
    expected, _ = recalibrate(model, [packed], passes=passes)
    for given in (mask, mask.double(), {"0": mask, "2": mask}):
        found, _ = recalibrate(model, [padded], mask=lambda batch, given=given: given, passes=passes)
        assert_close(dict(found.state_dict()), dict(expected.state_dict()), rtol=1e-9, atol=1e-12)
    with pytest.raises(
        ValueError, match="mask that fits the input of '0', \\[4, 7\\] without channels, got \\[4, 6\\]"
    ):
        recalibrate(model, [padded], mask=lambda batch: mask[:, :6], passes=passes)


def test_a_mask_of_samples_or_of_flattened_positions_fits() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(1, 2), nn.Flatten(0, 1), nn.BatchNorm1d(3))
    x = torch.randn(4, 2, 5, 3)
    keep = torch.tensor([True, False, True, True])
    found, _ = recalibrate(model, [x], mask=lambda batch: {"0": keep, "3": keep.repeat_interleave(10).view(4, 10)})
    assert_close(found[0].running_mean, x[keep].mean((0, 2, 3)))
    z = found[0].running_mean.new_tensor(model[0].train()(x[keep]).detach().numpy()).mean((0, 1, 2))
    assert_close(found[3].running_mean, z, rtol=1e-4, atol=1e-5)


def test_a_mask_that_the_model_passes_on_counts() -> None:
    layer = bn.BatchNorm1d(2)
    x, keep = torch.randn(6, 2, 3), torch.rand(6, 3) > 0.4
    found, _ = recalibrate(layer, [(x, keep)], forward=lambda model, batch: model(batch[0], mask=batch[1]))
    assert_close(found.running_mean, x.transpose(1, 2)[keep].mean(0))
