"""`update_running_stats`, which turns updates on or off independently of the mode."""

from __future__ import annotations

import pytest
import torch

from batchnorm import BatchNorm1d, BatchNormAct1d, update_running_stats


def model() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), BatchNorm1d(4), torch.nn.Sequential(BatchNormAct1d(4)))


def batches(m: torch.nn.Module) -> list[int]:
    return [int(b) for name, b in m.named_buffers() if name.endswith("num_batches_tracked")]


def test_off_uses_batch_statistics_and_updates_nothing() -> None:
    m, x = model().train(), torch.randn(8, 4)
    moving = m(x)
    state = {k: v.clone() for k, v in m.state_dict().items()}
    update_running_stats(m, False)
    assert m.training
    assert torch.equal(m(x), moving)
    for key, value in m.state_dict().items():
        assert torch.equal(value, state[key])
    update_running_stats(m, True)
    m(x)
    assert batches(m) == [2, 2]


def test_the_mode_does_not_touch_the_switch() -> None:
    m = model()
    update_running_stats(m, False)
    m.eval().train()
    m(torch.randn(8, 4))
    assert batches(m) == [0, 0]


def test_the_end_of_a_block_restores_each_layers_setting_also_after_an_error() -> None:
    m = model()
    m[1].update_running_stats = False

    def train_then_fail() -> None:
        with update_running_stats(m, True):
            m(torch.randn(8, 4))
            m[1](torch.randn(8, 5))

    with pytest.raises(ValueError, match="expects weight of shape"):
        train_then_fail()
    assert batches(m) == [1, 1]
    assert [m[1].update_running_stats, m[2][0].update_running_stats] == [False, True]


def test_torchs_own_layers_are_refused_and_nothing_changes() -> None:
    m = torch.nn.Sequential(BatchNorm1d(4), torch.nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"got BatchNorm1d of torch at '1'. Replace it by batchnorm.nn.BatchNorm1d"):
        update_running_stats(m, False)
    assert m[0].update_running_stats


def test_a_model_without_batch_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expects a model with layers of this library, got Linear with none"):
        update_running_stats(torch.nn.Linear(2, 2), False)
