"""The gradient of a bias that batch normalization takes away, and of one that it does not."""

import placement
import pytest
import torch


@pytest.mark.parametrize(("place", "redundant"), [("before", True), ("after", False)])
def test_the_bias_before_batch_normalization_has_no_gradient_but_rounding(place, redundant):
    model = placement.network(place, "relu", bias=True, seed=0)
    model(torch.randn(8, 1, 28, 28)).square().sum().backward()
    gradients = dict(model.named_parameters())
    bias, beta = (
        sum(gradients[name].grad.square().sum() for name in gradients if name.endswith(".bias") and kind(name)) ** 0.5
        for kind in (
            lambda name: isinstance(model[int(name.split(".")[0])], torch.nn.Conv2d),
            lambda name: isinstance(model[int(name.split(".")[0])], placement.BatchNorm2d),
        )
    )
    assert placement.bias_over_beta(model) == pytest.approx((bias / beta).item(), rel=1e-4)
    assert (placement.bias_over_beta(model) < 1e-3) == redundant


def test_weights_do_not_depend_on_whether_there_are_biases():
    with_bias, without = (placement.network("before", "relu", bias=bias, seed=3).state_dict() for bias in (True, False))
    assert all(torch.equal(value, with_bias[name]) for name, value in without.items())
