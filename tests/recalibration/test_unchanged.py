"""`recalibrate` leaves the given model as it was, also after a failure; other libraries; progress and report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from batchnorm.recalibration import recalibrate
from tests.recalibration.models import SIZES, Recorder, assert_as_before, batches, network, norms, snapshot

# As it was


def test_the_given_model_is_unchanged() -> None:
    model = network().train()
    model[0].eval()
    before = snapshot(model)
    result = recalibrate(model, batches())
    assert_as_before(model, before)
    assert result.model is not model


def test_in_place_changes_only_the_statistics() -> None:
    model = network().train()
    model[0].eval()
    model[4].weight.requires_grad_(False)
    before = snapshot(model)
    assert recalibrate(model, batches(), inplace=True).model is model
    after = snapshot(model)
    changed = {k for k, v in before["state"].items() if not torch.equal(v, after["state"][k])}
    assert changed == {f"{path}.running_{what}" for path in norms(model) for what in ("mean", "var")}
    for what in ("modes", "hooks", "momentum", "gradients"):
        assert before[what] == after[what]
    assert torch.equal(before["random"][0], after["random"][0])


def test_a_cumulative_average_continues_from_the_batches_seen() -> None:
    model = nn.BatchNorm1d(1, momentum=None)
    data = [torch.randn(5, 1) for _ in range(3)]
    recalibrate(model, data, inplace=True)
    assert model.num_batches_tracked == 3


class Faulty:
    """Data that raise in the middle."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches()[:2]
        raise OSError("disk gone")


def fails_late(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    if len(x) == SIZES[3]:
        raise RuntimeError("out of luck")
    return y


def with_nan() -> list[Tensor]:
    data = batches()
    data[2][0, 1, 3, 3] = float("nan")
    return data


@pytest.mark.parametrize("passes", ["single", "sequential"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (Faulty(), {}, OSError, "disk gone"),
        (batches(), {"forward": fails_late}, RuntimeError, "out of luck"),
        (with_nan(), {}, ValueError, "a mean that is not finite in torch.float32 at '1'"),
        ([], {}, ValueError, "at least one batch, got empty data"),
        ([*batches(), torch.rand(4, 5, 8, 8)], {}, RuntimeError, "to have 3 channels, but got 5"),
    ],
    ids=["data-raise", "forward-raises", "nan", "no-data", "wrong-shape"],
)
def test_a_failure_leaves_the_model_as_it_was(
    passes: str, cache_bytes: int, data: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network().train()
    model[5].eval()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate(
            model, data, passes=passes, cache_bytes=cache_bytes, only="*", shared="separate", inplace=True, **options
        )
    assert_as_before(model, before)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_an_interruption_leaves_the_model_as_it_was(passes: str) -> None:
    model = network()
    before = snapshot(model)

    def interrupted(model: nn.Module, x: Tensor) -> Tensor:
        if len(x) == SIZES[3]:
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches(), passes=passes, forward=interrupted, inplace=True)
    assert_as_before(model, before)


def test_one_value_per_channel_has_no_variance() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    data = [torch.randn(8, 2), torch.randn(1, 2)]
    with pytest.raises(ValueError, match="more than one value per channel in every batch, got one at '0'"):
        recalibrate(model, data)
    found, _ = recalibrate(model, data, passes="sequential")
    assert_close(found[0].running_var, torch.cat(data).var(0))
    with pytest.raises(ValueError, match="got one in all the data at '0'"):
        recalibrate(model, data[1:], passes="sequential")


def test_data_that_cannot_be_read_twice_are_refused_if_that_is_needed() -> None:
    with pytest.raises(ValueError, match="can be read again, got an iterator"):
        recalibrate(network(), iter(batches()), passes="sequential", cache_bytes=0)

    class Shrinks:
        def __init__(self) -> None:
            self.data = batches()

        def __iter__(self) -> Iterator[Tensor]:
            yield from self.data
            self.data.pop()

    with pytest.raises(ValueError, match="the same batches each time data are read, got 24 samples in 3 batches"):
        recalibrate(network(), Shrinks(), passes="sequential", cache_bytes=0)


# With the rest


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_compiled_models_are_measured_too(passes: str) -> None:
    model = network()
    expected, _ = recalibrate(model, batches(), passes=passes)
    compiled = torch.compile(model, backend="eager")
    compiled(batches()[0])
    found, _ = recalibrate(compiled, batches(), passes=passes, inplace=True)
    for ours, theirs in zip(norms(found).values(), norms(expected).values(), strict=True):
        assert torch.equal(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_third_party_network_is_measured_exactly(passes: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    data = [{"pixel_values": 9 + torch.randn(n, 3, 24, 24), "labels": torch.zeros(n).long(), "id": n} for n in (5, 2)]
    recorder = Recorder(model)
    found, report = recalibrate(model, data, passes=passes, inplace=True)
    assert len(report.layers) == len(norms(found)) == 8
    for path, layer in norms(found).items():
        mean, var = recorder.two_pass(path, start=len(recorder.seen[path]) - len(data))
        np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-6)


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_model_from_inference_mode_can_be_trained(passes: str) -> None:
    expected, _ = recalibrate(network(), batches(), passes=passes)
    with torch.inference_mode():
        found, _ = recalibrate(network(), [x.clone() for x in batches()], passes=passes)
        model = network()
        recalibrate(model, batches(), passes=passes, inplace=True)
    for each in (found, model):
        assert_close(dict(each.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)
    found.train()(batches()[0]).sum().backward()
    assert found[0].weight.grad is not None


def test_averaged_weights_get_statistics_of_their_own() -> None:
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    found, _ = recalibrate(average, batches())
    expected, _ = recalibrate(model, batches())
    assert_close(found.module[5].running_var, expected[5].running_var)


def test_half_precision_that_overflows_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).half()
    with pytest.raises(ValueError, match="a variance that is not finite in torch.float16 at '0'"):
        recalibrate(model, [300 * torch.randn(64, 2).half()])


@pytest.mark.parametrize("passes", ["single", "sequential"])
def test_a_bar_shows_progress(passes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    recalibrate(network(), batches(), passes=passes, progress=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err and not shown.out
    assert ("recalibrate" if passes == "single" else "layer 3 of 3") in shown.err


def test_the_report_says_how_far_each_layer_was_off() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = [torch.tensor([[2.0], [6.0]])]
    _, report = recalibrate(model, data)
    assert report["0"].shift.item() == pytest.approx(4 / 8**0.5)
    assert report["0"].ratio.item() == pytest.approx(8**0.5)
    assert str(report).splitlines() == [
        "recalibrate: 1 changed, 0 left; 2 samples in 1 batch, single pass",
        "",
        "layer  was             now                                      why",
        "0      BatchNorm1d(1)  mean moved 1.4σ (at most 1.4σ), σ ×2.83",
    ]
    with pytest.raises(KeyError):
        report["1"]
