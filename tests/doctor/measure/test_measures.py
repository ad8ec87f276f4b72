"""The measurements behind the rules, against simulation and other libraries."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from batchnorm.doctor import diagnose
from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.distance import distance_of
from batchnorm.doctor.measure.effect import Outcome, compared, student_t
from batchnorm.doctor.measure.independence import independence_of
from batchnorm.doctor.measure.layers import Samples
from batchnorm.doctor.pytorch.layers import layers_of
from batchnorm.reference import moments


@pytest.mark.parametrize(("freedom", "tolerance"), [(2, 0.05), (3, 0.01), (5, 1e-3), (11, 1e-4), (200, 1e-6)])
def test_student_t(freedom: int, tolerance: float) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=tolerance)


def test_inflation_is_the_f_statistic() -> None:
    values = torch.randn(60, 3, dtype=torch.float64).numpy()
    batch = np.arange(60) // 13  # the last one is smaller
    spread = independence_of(values, batch, permutations=1)
    for channel in range(3):
        f = stats.f_oneway(*(values[batch == k, channel] for k in range(5))).statistic
        assert spread.inflation[channel].item() == pytest.approx(f)


def test_independent_samples_are_rarely_called_dependent() -> None:
    p = [
        independence_of(torch.randn(96, 40, generator=torch.Generator().manual_seed(seed)).exp().numpy(),
                        np.arange(96) // 8, permutations=39).p
        for seed in range(100)
    ]  # fmt: skip
    # 100 trials at 5 %: 13 or more have a probability below 0.001
    assert sum(value <= 0.05 for value in p) < 13
    assert 0.35 < sum(p) / len(p) < 0.65


def test_one_channel_that_depends_is_seen_among_many() -> None:
    values = torch.randn(96, 200).numpy()
    values[:, 7] += (np.arange(96) // 8 % 2) * 3
    assert independence_of(values, np.arange(96) // 8).p == pytest.approx(1 / 200)


def test_constant_channels_and_a_single_batch_say_nothing() -> None:
    assert independence_of(np.ones((10, 3)), np.arange(10) // 5).p == 1.0
    assert independence_of(torch.randn(10, 3).numpy(), np.zeros(10, int)).p == 1.0


def test_noise_is_that_of_simulated_batches() -> None:
    """The deviation of one sample's normalized values over random batches, where positions are correlated."""
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> torch.Tensor:
        own = torch.randn(number, 1, 1, generator=generator, dtype=torch.float64)
        return 2 * own + torch.randn(number, 1, 16, generator=generator, dtype=torch.float64)

    x, size = draw(20000), 32
    samples = Samples()
    samples.add(x.mean(2).numpy(), x.square().mean(2).numpy(), 0)
    positions = draw(1)[0, 0]
    seen = []
    for _ in range(3000):
        batch = x[torch.randint(len(x), (size,), generator=generator)]
        seen.append((positions - batch.mean()) / batch.std(correction=0))
    # For a value at one deviation from the mean both parts count; over the values, x̂² is 1 on average.
    value = torch.stack(seen)
    standard = (positions - x.mean()) / x.std()
    scale = ((samples.noise(size, 0.0) * 1).item()) ** 2
    u, v = x.mean(2).var(), x.square().mean(2).var() / (4 * x.var() ** 2)
    expected = ((u / x.var() + standard**2 * v) / size).sqrt()
    assert torch.allclose(value.std(0), expected, rtol=0.1)
    assert scale == pytest.approx(float((u / x.var() + v) / size), rel=1e-2)


def test_statistics_that_are_right_are_not_off_and_wrong_ones_by_how_much() -> None:
    x = torch.randn(512, 64, 3, 3) * 2 + 1
    model = nn.Sequential(nn.BatchNorm2d(64, momentum=None))
    model(x)
    (layer,) = layers_of(model)
    values = x.double().numpy()
    z = values - layer.running.mean[0][:, None, None]
    samples = Samples()
    samples.add(z.mean((2, 3)), np.square(z).mean((2, 3)), 0)
    layer = replace(layer, calls=(moments(values),), samples=samples)
    right = distance_of(layer, 512, 64)
    assert right.shift == 0 and right.scale < 1e-3 and abs(right.divergence) < 1e-3 and not right.matters
    layer.running.mean[:] += 3
    layer.running.var[:] *= 4
    wrong = distance_of(layer, 512, 64)
    assert wrong.shift == pytest.approx(1.5, rel=0.01)
    assert math.exp(wrong.scale) == pytest.approx(2, rel=0.01)
    # KL(N(0, 1) || N(1.5, 4)) = (1 + 2.25)/8 - 1/2 + ln 2
    assert wrong.divergence == pytest.approx(3.25 / 8 - 0.5 + math.log(2), rel=0.01)


def outcome(losses: list[float], shift: float = 0.0) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    return Outcome([torch.randn(40, 5, generator=generator).double().numpy() + shift * (np.arange(5) == 2)] * 8, losses)


@pytest.mark.parametrize(
    ("more", "shift", "severity"),
    [
        (0.0, 0.0, Severity.NOTE),
        (1.0, 0.0, Severity.NOTE),  # a loss that grows while the output stays is not one that matters
        (0.02, 5.0, Severity.NOTE),
        (0.2, 5.0, Severity.WARNING),
        (1.0, 5.0, Severity.ERROR),
        (-1.0, 5.0, Severity.NOTE),
    ],
)
def test_severity_follows_the_effect(more: float, shift: float, severity: Severity) -> None:
    base = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0, 1.0]
    found = compared(outcome([loss + more for loss in base], shift), outcome(base))
    assert found.severity == severity
    assert found.loss == pytest.approx(more, abs=1e-12)


def test_a_loss_that_scatters_is_unsure() -> None:
    base = [1.0] * 8
    found = compared(outcome([1 + 3 * (-1) ** i + 0.6 for i in range(8)], 5.0), outcome(base))
    assert found.confidence == "low"
    assert found.severity == Severity.NOTE


def test_without_a_loss_a_large_change_is_a_warning() -> None:
    assert compared(outcome([], 5.0), outcome([])).severity == Severity.WARNING
    assert compared(outcome([], 0.1), outcome([])).severity == Severity.NOTE


def test_a_constant_channel_is_measured_in_running_deviations() -> None:
    layer, x = nn.BatchNorm1d(8), torch.randn(512, 8)
    x[:, 3] = 0.5
    with torch.no_grad():
        layer.running_mean.copy_(x.mean(0) + 0.2)  # and a running variance of 1
    (measures,) = diagnose(nn.Sequential(layer), x.split(64)).measures
    assert measures.shift == pytest.approx(0.2, abs=0.05)  # with it 22σ
    (alone,) = diagnose(nn.Sequential(nn.BatchNorm1d(2)), torch.ones(4, 64, 2).unbind()).measures
    assert alone.shift == pytest.approx(1, rel=1e-4)
