"""Networks that start alike, and what is read off the steps that they needed."""

import learning_rate
import pytest
import torch


def test_both_networks_start_with_the_same_weights():
    plain, normalized = (learning_rate.build(norm, 10, seed=3) for norm in ("none", "batch"))
    weights = [
        [module.weight for module in network if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
        for network in (plain, normalized)
    ]
    assert len(weights[0]) == 6
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def records(steps):
    """Records from {norm: {rate: one for each seed}}."""
    return [
        {"norm": norm, "rate": rate, "seed": seed, "reached": reached, "steps": 100, "target": 0.9}
        for norm, rates in steps.items()
        for rate, row in rates.items()
        for seed, reached in enumerate(row)
    ]


def test_effects_come_from_the_rates_at_which_each_network_is_quickest_and_the_largest_that_trains():
    found = records(
        {
            "none": {0.1: [80, 40], 0.2: [20, None], 0.4: [None, None], 0.8: [None, None]},
            "batch": {0.1: [40, 40], 0.2: [30, 30], 0.4: [10, 20], 0.8: [5, None]},
        }
    )
    assert learning_rate.best_rate(found, "none") == 0.1
    assert learning_rate.best_rate(found, "batch") == 0.4
    faster, higher, same = learning_rate.effects(found)
    assert faster.values == [8, 2]
    assert higher.values == pytest.approx([0.8 / 0.2, 0.4 / 0.1])
    assert same.values == [2, 1]


def test_a_network_that_no_rate_trains_is_said_to_need_more_steps():
    with pytest.raises(ValueError, match="more steps"):
        learning_rate.best_rate(records({"none": {0.1: [None, 5]}}), "none")
