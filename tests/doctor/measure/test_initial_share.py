"""The weight of the initial values is estimated if it alone explains the running statistics."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike

from batchnorm.doctor.measure.initial_share import estimated_share
from batchnorm.doctor.measure.layers import Array, Layer, Statistics
from batchnorm.reference.statistics import Moments


def layer(mean: ArrayLike, var: ArrayLike, running_mean: ArrayLike, running_var: ArrayLike) -> Layer:
    """Return a layer whose updates are not counted."""
    count, mean = np.array(100.0), np.asarray(mean)
    running = Statistics(np.asarray(running_mean)[None], np.asarray(running_var)[None])
    moments = Moments(count, mean, count * var, count)
    return Layer(("norm",), "BatchNorm", len(mean), 1e-3, 0.01, running, True, True, calls=(moments,))


def population(seed: int, channels: int = 16) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=channels), np.exp(generator.normal(size=channels))


def mixed(share: float, seed: int = 0, channels: int = 16) -> Layer:
    """Return a layer whose initial values have this weight."""
    mean, var = population(seed, channels)
    return layer(mean, var, (1 - share) * mean, share + (1 - share) * var)


def scaled(factor: float, seed: int = 0, spread: float = 1.0) -> Layer:
    """Return a layer whose input is larger by this factor than that of its running statistics."""
    mean, var = population(seed)
    var = spread * var
    return layer(factor * mean, factor**2 * var, mean, var)


@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.1])
def test_the_share_is_that_of_the_initial_values(share: float) -> None:
    assert estimated_share([mixed(share, seed) for seed in range(3)]) == pytest.approx(share, rel=1e-6)
    assert estimated_share([mixed(share), *(mixed(share / 4, seed) for seed in (1, 2))]) == pytest.approx(share / 4)


def test_layers_whose_statistics_fit_have_no_initial_values() -> None:
    assert estimated_share([mixed(0.0, seed) for seed in range(3)]) == 0
    assert estimated_share([mixed(0.9, 0), mixed(0.0, 1), mixed(0.0, 2)]) == 0


def test_data_of_another_scale_are_no_initial_values() -> None:
    for factor in np.geomspace(0.1, 1000, 60):
        assert estimated_share([scaled(factor)]) == 0
        assert estimated_share([scaled(factor, seed) for seed in range(3)]) == 0
        assert estimated_share([scaled(factor, spread=100.0)]) == 0


def test_other_data_are_no_initial_values() -> None:
    mean, var = population(0)
    assert estimated_share([layer(mean + 2.0, var, mean, var)]) == 0
    assert estimated_share([layer(*population(1), mean, var)]) == 0
    noise = np.random.default_rng(2).normal(size=(2, 16)) / 100  # trained on standardized data
    assert estimated_share([layer(3 + mean, 9 * var, noise[0], 1 + noise[1])]) == 0


def test_a_share_that_the_data_do_not_determine_is_none() -> None:
    assert estimated_share([mixed(0.9, channels=4)]) == 0
    assert estimated_share([layer(np.zeros(16), np.ones(16), np.zeros(16), np.ones(16))]) == 0
    assert estimated_share([]) == 0
