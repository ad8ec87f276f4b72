"""The reference's gradients, checked against finite differences, torch's autograd and brute force."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose

from batchnorm import reference as ref
from tests.cases import KINKS
from tests.reference.definitions import INDEX, Array, error


class Case:
    """A forward pass with all that can be differentiated: x, weight, bias, residual."""

    def __init__(
        self,
        *,
        shape: tuple[int, ...] = (5, 3, 2, 2),
        rows: int | None = None,
        given: int | bool = False,
        weights: Callable[[Array], Array] | None = None,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(0)
        self.axis = options.get("axis", 1)
        channels = shape[self.axis]
        affine = (channels,) if rows is None else (rows, channels)
        self.inputs: dict[str, Any] = {
            "x": rng.normal(2.0, 1.5, shape),
            "weight": rng.normal(1.0, 0.5, affine),
            "bias": rng.normal(0.0, 1.0, affine),
            "residual": rng.normal(0.0, 2.0, shape),
        }
        self.options = options
        if given:
            stats = (channels,) if given is True else (given, channels)
            self.options |= {"mean": rng.normal(2.0, 1.0, stats), "var": rng.uniform(0.5, 2.0, stats)}
        if weights is not None:
            self.options["weights"] = weights(rng.uniform(0.1, 2.0, np.delete(shape, self.axis)))
        self.dy = rng.normal(size=shape)
        self.v = rng.normal(size=shape)
        self.v_weight, self.v_bias = rng.normal(size=affine), rng.normal(size=affine)

    def forward(self, **changed: Array) -> ref.Forward:
        compute = ref.normalize if "mean" in self.options else ref.forward_training
        return compute(eps=0.1, **self.inputs | changed, **self.options)


def mask(w: Array) -> Array:
    return (w > 0.8).astype(np.float64)


CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: Case(),
    "two_dims": lambda: Case(shape=(6, 2)),
    "one_channel": lambda: Case(shape=(4, 1, 3)),
    "one_sample": lambda: Case(shape=(1, 2, 3, 3)),
    "channels_last": lambda: Case(shape=(5, 2, 2, 3), axis=-1),
    "channels_first": lambda: Case(shape=(3, 5, 2), axis=0),
    "weights": lambda: Case(weights=lambda w: w),
    "mask": lambda: Case(weights=mask),
    "ghost": lambda: Case(index=INDEX, groups=2),
    "ghost_with_empty_group": lambda: Case(index=INDEX, groups=3),
    "domains": lambda: Case(index=INDEX, groups=2, rows=2),
    "conditional": lambda: Case(index=INDEX, rows=4),
    "affine_per_sample": lambda: Case(index=range(5), rows=5),
    "all_at_once": lambda: Case(
        shape=(5, 2, 2, 3), axis=-1, index=INDEX, groups=2, rows=3, weights=lambda w: w, activation="silu"
    ),
    "all_at_once_channels_first": lambda: Case(shape=(3, 5, 4), axis=0, index=INDEX, groups=2, weights=mask),
    "inference": lambda: Case(given=True),
    "inference_domains": lambda: Case(given=2, index=INDEX, rows=2),
    "inference_one_value": lambda: Case(shape=(1, 3), given=True),
} | {
    f"{kind}_{name}": lambda name=name, given=given: Case(given=given, activation=name, negative_slope=0.2)
    for name in ref.ACTIVATIONS
    for kind, given in (("training", False), ("inference", True))
}


@pytest.fixture(params=[*CASES.values()], ids=[*CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param()


def differences(f: Callable[[Array], float], at: Array, h: float = 1e-5) -> Array:
    """The gradient of f by central differences, one entry at a time."""
    gradient = np.zeros_like(at)
    for i in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[i] = h
        gradient[i] = (f(at + step) - f(at - step)) / (2 * h)
    return gradient


def of(name: str, f: Callable[..., float]) -> Callable[[Array], float]:
    """f as a function of its argument called `name` alone."""
    return lambda at: f(**{name: at})


def test_gradients_equal_finite_differences(case: Case) -> None:
    forward = case.forward()
    kinks = np.array(KINKS.get(case.options.get("activation", "none"), []))
    assert np.abs(forward.z[..., None] - kinks).min(initial=1.0) > 1e-3, "the case must stay away from the kinks"
    found = ref.backward(case.dy, forward)
    gradients = {"x": found.dx, "weight": found.dweight, "bias": found.dbias, "residual": found.dz}

    def loss(**changed: Array) -> float:
        return float(np.sum(case.dy * case.forward(**changed).y))

    for name, gradient in gradients.items():
        by_hand = differences(of(name, loss), case.inputs[name])
        assert_allclose(gradient, by_hand, rtol=1e-7, atol=1e-8, err_msg=name)


def test_by_parts_equals_closed_form(case: Case) -> None:
    forward = case.forward()
    closed, by_parts = ref.backward(case.dy, forward), ref.backward_by_parts(case.dy, forward)
    for name in ("dz", "dweight", "dbias", "dx_hat", "dx"):
        assert_allclose(getattr(by_parts, name), getattr(closed, name), rtol=1e-12, atol=1e-12, err_msg=name)


def test_by_parts_intermediates_equal_finite_differences() -> None:
    """dσ² with μ held, and dμ with σ² following x − μ, as the chain rule of the paper has them."""
    case = Case()
    x, weight = case.inputs["x"], case.inputs["weight"]
    forward = case.forward()
    found = ref.backward_by_parts(case.dy, forward)

    def loss(mean: Array, var: Array) -> float:
        return float(np.sum(case.dy * ref.normalize(x, mean, var, weight, eps=0.1).y))

    def var_about(mean: Array) -> Array:
        return ((x - mean[:, None, None]) ** 2).mean(axis=(0, 2, 3))

    dvar = differences(lambda var: loss(forward.mean, var), forward.var)
    dmean = differences(lambda mean: loss(mean, var_about(mean)), forward.mean)
    assert_allclose(found.dvar, dvar, rtol=1e-7)
    assert_allclose(found.dmean, dmean, rtol=1e-7)


def test_double_backward_equals_finite_differences_of_backward(case: Case) -> None:
    forward = case.forward()
    dz = case.dy * forward.slope

    def gradients_of(dz: Array = dz, **changed: Array) -> float:
        plain = dict(case.options)
        for option in ("activation", "negative_slope"):
            plain.pop(option, None)
        compute = ref.normalize if "mean" in plain else ref.forward_training
        found = ref.backward(dz, compute(eps=0.1, **case.inputs | changed, **plain))
        return float(
            np.sum(case.v * found.dx) + np.sum(case.v_weight * found.dweight) + np.sum(case.v_bias * found.dbias)
        )

    found = ref.double_backward(case.v, case.v_weight, case.v_bias, dz, forward)
    assert_allclose(found.dz, differences(of("dz", gradients_of), dz), rtol=1e-7, atol=1e-8)
    for name, gradient in (("x", found.dx), ("weight", found.dweight), ("bias", 0.0)):
        by_hand = differences(of(name, gradients_of), case.inputs[name])
        assert_allclose(gradient, by_hand, rtol=1e-7, atol=1e-8, err_msg=name)


def test_double_backward_equals_torch() -> None:
    case = Case()
    leaves = [torch.from_numpy(case.inputs[name]).clone().requires_grad_() for name in ("x", "weight", "bias")]
    dy = torch.from_numpy(case.dy).clone().requires_grad_()
    y = F.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True, 0.0, 0.1)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    v = [torch.from_numpy(a) for a in (case.v, case.v_weight, case.v_bias)]
    expected = torch.autograd.grad(first, (dy, leaves[0], leaves[1]), v)
    found = ref.double_backward(case.v, case.v_weight, case.v_bias, case.dy, case.forward())
    for ours, theirs in zip(found, expected, strict=True):
        assert_allclose(ours, theirs, atol=1e-12)


def copied_backward(
    dy: Array, forward: ref.Forward, *, center_x: bool, sum_axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """The backward that is copied from page to page, for `[N, C, H, W]`: dx, dγ, dβ.

    As copied: x̂ − μ where x − μ belongs, and sums over axis 0 alone, right for `[N, C]` only.
    """

    def total(t: Array) -> Array:
        return t.sum(axis=sum_axes, keepdims=True)

    mean, invstd = forward.mean[:, None, None], forward.invstd[:, None, None]
    m = math.prod(dy.shape[axis] for axis in sum_axes)
    centered = forward.x_centered if center_x else forward.x_hat - mean
    dx_hat = dy * forward.weight[:, None, None]
    dvar = total(dx_hat * centered * -0.5 * invstd**3)
    dmean = total(dx_hat * -invstd) + dvar * total(-2 * centered) / m
    dx = dx_hat * invstd + dvar * 2 * centered / m + dmean / m
    return dx, total(dy * forward.x_hat), total(dy)


@pytest.mark.parametrize(
    ("mean", "deviation", "wrong_center", "wrong_axis", "both"),
    [(2.0, 1.5, 0.794, 1.214, 0.872), (0.0, 1.0, 0.022, 1.214, 1.138)],
    ids=["as_data_are", "standardized"],
)
def test_the_widely_copied_backward_is_wrong_and_ours_is_right(
    mean: float, deviation: float, wrong_center: float, wrong_axis: float, both: float
) -> None:
    """The relative errors of dx are those that the mathematics page states."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(mean, deviation, (8, 3, 4, 4)), rng.normal(size=(8, 3, 4, 4))
    weight = np.array([0.5, 1.0, 2.0])
    forward = ref.forward_training(x, weight)
    dy = forward.y - target  # of the squared error
    true = differences(lambda at: 0.5 * np.sum((ref.forward_training(at, weight).y - target) ** 2), x)

    def copied(*, center_x: bool, sum_axes: tuple[int, ...]) -> float:
        return error(copied_backward(dy, forward, center_x=center_x, sum_axes=sum_axes)[0], true)

    assert error(ref.backward(dy, forward).dx, true) < 1e-8
    assert error(ref.backward_by_parts(dy, forward).dx, true) < 1e-8
    assert copied(center_x=True, sum_axes=(0, 2, 3)) < 1e-8, "with both mistakes repaired it is the chain rule"
    assert copied(center_x=False, sum_axes=(0, 2, 3)) == pytest.approx(wrong_center, abs=0.001)
    assert copied(center_x=True, sum_axes=(0,)) == pytest.approx(wrong_axis, abs=0.001)
    assert copied(center_x=False, sum_axes=(0,)) == pytest.approx(both, abs=0.001)
    _, dweight, dbias = copied_backward(dy, forward, center_x=False, sum_axes=(0,))
    assert dweight.shape == dbias.shape == (1, 3, 4, 4), "not even dγ and dβ have one value per channel"
