"""Every operator × implementation × case against the float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import batchnorm.ops  # noqa: F401  (defines the operators)
from batchnorm import reference
from tests.cases import ACTIVATIONS, CASES, EPS, KINKS, NEGATIVE_SLOPE, SMOOTH, Case, ids
from tests.ops import implementations
from tests.ops.implementations import Ops, over
from tests.tolerance import Array, Terms, assert_within, bound

ALONE_OR_NOT = ["alone", "residual"]
SEVERAL = [case for case in CASES if case.m != 1]


@pytest.fixture(params=implementations.names())
def op(request: pytest.FixtureRequest) -> Iterator[Ops]:
    with implementations.chosen(request.param) as ops:
        yield ops


def wide(t: Tensor | None) -> Array | None:
    return None if t is None else t.detach().double().numpy()


def away_from_kinks(dy: Tensor, z: Array, activation: str) -> Tensor:
    """Return dy, with zeros at values of z so near a kink that rounding decides f′."""
    near = np.zeros(z.shape, dtype=bool)
    for kink in KINKS.get(activation, ()):
        near |= np.abs(z - kink) < 0.03
    return torch.where(torch.from_numpy(near), 0.0, dy).to(dy.dtype)


def kept(activation: str, residual: Tensor | None, y: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the tensor that autograd keeps for f′ besides x: none, y or the residual."""
    if residual is None or activation == "none":
        return None, None
    return (residual, None) if activation in SMOOTH else (None, y)


def assert_like_x(result: Tensor, x: Tensor) -> None:
    expected = torch.empty_like(x)
    assert (result.dtype, result.stride()) == (expected.dtype, expected.stride())


class Pass:
    """Forward and backward of a case by the reference, with the terms that bound errors."""

    def __init__(self, case: Case, activation: str, with_residual: bool, *, training: bool) -> None:
        self.case, self.x = case, case.x()
        self.weight, self.bias = case.parameters()
        self.residual = case.random(3) if with_residual else None
        options = {
            "residual": wide(self.residual),
            "activation": activation,
            "negative_slope": NEGATIVE_SLOPE,
            "eps": EPS,
        }
        self.activation = (EPS, activation, NEGATIVE_SLOPE)
        x, *affine = wide(self.x), wide(self.weight), wide(self.bias)
        if training:
            self.use(reference.forward_training(x, *affine, **options))
        else:
            self.mean, self.var = case.running()
            self.use(reference.forward_inference(x, wide(self.mean), wide(self.var), *affine, **options))

    def use(self, forward: reference.Forward) -> None:
        """Compare gradients of the current x, weight, bias and residual with this pass."""
        activation = self.activation[1]
        self.forward, self.terms = forward, Terms(forward, wide(self.residual), wide(self.bias))
        self.dy = away_from_kinks(self.case.random(4), forward.z, activation)
        self.gradients = reference.backward(wide(self.dy), forward)
        self.dz_terms = self.terms.dz(wide(self.dy), smooth=activation in SMOOTH)

    def check_y(self, y: Tensor) -> None:
        # |f′| is at most 1.5 (hardswish)
        assert_within(y, self.forward.y, bound(1.5 * self.terms.z, self.case.dtype, self.forward.y), "y")

    def check_gradients(self, dx: Tensor, dweight: Tensor, dbias: Tensor, dz: Tensor) -> None:
        dtype = self.case.dtype
        sum_dz, sum_dz_xhat = self.terms.sums(self.dz_terms, like=self.forward.weight)
        assert_within(dbias, self.gradients.dbias, bound(sum_dz, dtype), "dbias")
        assert_within(dweight, self.gradients.dweight, bound(sum_dz_xhat, dtype), "dweight")
        allowed = bound(self.terms.dx(self.dz_terms), dtype, self.gradients.dx)
        assert_within(dx, self.gradients.dx, allowed, "dx")
        assert_within(dz, self.gradients.dz, bound(self.dz_terms, dtype, self.gradients.dz), "dz")


@functools.lru_cache(maxsize=1)  # the implementations of one point follow one another
def reference_pass(case: Case, activation: str, residual: str, *, training: bool) -> Pass:
    return Pass(case, activation, residual == "residual", training=training)


@over(SEVERAL, activation=ACTIVATIONS, residual=ALONE_OR_NOT)
def test_train_forward_and_backward_agree_with_the_reference(
    op: Ops, case: Case, activation: str, residual: str
) -> None:
    p = reference_pass(case, activation, residual, training=True)
    y, mean, mean_low, var = op("train_forward")(p.x, p.weight, p.bias, p.residual, *p.activation)
    p.check_y(y)
    assert mean.dtype == mean_low.dtype == var.dtype == case.statistics_dtype
    deviation = p.terms.deviation()
    in_float64 = bound(np.abs(p.forward.mean), torch.float64)  # errors of the reference, and of adding the pair
    allowed = bound(deviation, case.dtype) + in_float64
    assert_within(mean.double() + mean_low.double(), p.forward.mean, allowed, "mean")
    assert_within(var, p.forward.var, bound(p.forward.var, case.dtype), "var")
    assert (var >= 0).all()

    saved = kept(activation, p.residual, y)
    gradients = op("train_backward")(p.dy, p.x, *saved, mean, mean_low, var, p.weight, p.bias, *p.activation, True)
    p.check_gradients(*gradients)


def test_a_large_mean_costs_nothing_in_float64_either(op: Ops) -> None:
    # The reference is no more precise than float64 x. The same deviations around zero are therefore the reference.
    around_zero = (torch.randn(4, 3, 16, 16, dtype=torch.float64) * 2**20).round() / 2**20
    far = around_zero + 1e6
    assert torch.equal(far - 1e6, around_zero)
    arguments = (None, None, None, EPS, "none", 0.0)
    y, mean, mean_low, var = op("train_forward")(far, *arguments)
    expected = reference.forward_training(around_zero.numpy(), eps=EPS)
    terms = Terms(expected, None, None)
    assert_within(y, expected.y, bound(terms.z, torch.float64, expected.y), "y")
    dy = torch.randn_like(far)
    saved = (dy, far, None, None, mean, mean_low, var, None, None)
    dx = op("train_backward")(*saved, EPS, "none", 0.0, False)[0]
    gradients = reference.backward(dy.numpy(), expected)
    assert_within(dx, gradients.dx, bound(terms.dx(np.abs(dy.numpy())), torch.float64, gradients.dx), "dx")


@over(CASES, activation=ACTIVATIONS, residual=ALONE_OR_NOT)
def test_normalize_and_its_backward_agree_with_the_reference(
    op: Ops, case: Case, activation: str, residual: str
) -> None:
    p = reference_pass(case, activation, residual, training=False)
    y = op("normalize")(p.x, p.mean, None, p.var, p.weight, p.bias, p.residual, None, *p.activation)
    p.check_y(y)
    saved = (p.dy, p.x, *kept(activation, p.residual, y), p.mean, None, p.var, p.weight, p.bias)
    dx, dweight, dbias, dz = op("normalize_backward")(*saved, None, 1, *p.activation, True)
    p.check_gradients(dx, dweight, dbias, dz)
    sum_dz, sum_dz_xhat = op("backward_reduce")(*saved, None, 1, *p.activation)
    p.check_gradients(dx, sum_dz_xhat, sum_dz, dz)


@over(SEVERAL, activation=["none", "relu", "silu"], residual=ALONE_OR_NOT)
def test_the_halves_compute_the_same_as_the_fused_operators(
    op: Ops, case: Case, activation: str, residual: str
) -> None:
    p = reference_pass(case, activation, residual, training=True)
    count, mean, mean_low, m2 = op("moments")(p.x, None, None, 1)
    assert count.shape == ()
    assert count == case.m
    var = m2 / max(case.m, 1)
    statistics = (mean, mean_low, var)
    y = op("normalize")(p.x, *statistics, p.weight, p.bias, p.residual, None, *p.activation)
    p.check_y(y)
    saved = (p.dy, p.x, *kept(activation, p.residual, y), *statistics, p.weight, p.bias)
    sum_dz, sum_dz_xhat = op("backward_reduce")(*saved, None, 1, *p.activation)
    gamma = 1.0 if p.weight is None else p.weight.to(var.dtype)
    means = (gamma * sum_dz / max(case.m, 1), gamma * sum_dz_xhat / max(case.m, 1))
    dx, dz = op("backward_apply")(*saved, *means, None, None, *p.activation, True)
    p.check_gradients(dx, sum_dz_xhat, sum_dz, dz)


def mask_for(case: Case, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (case.shape[0], *case.shape[2:])
    if kind == "mask":
        mask = torch.rand(shape, generator=generator) < 0.6
        mask[:2] = True  # at least two values
        return mask.to(case.statistics_dtype)
    return torch.rand(shape, generator=generator, dtype=case.statistics_dtype) + 0.25


ROWS = [case for case in CASES if case.shape[0] > 3 and case.m > 8 and case.shape[0] < 1000]


@over(ROWS, kind=["mask", "weights"])
def test_weights_agree_with_the_reference(op: Ops, case: Case, kind: str) -> None:
    weights = mask_for(case, kind)
    p = Pass(case, "relu", False, training=True)
    options = {"activation": "relu", "eps": EPS, "weights": wide(weights)}
    p.use(reference.forward_training(wide(p.x), wide(p.weight), wide(p.bias), **options))

    poisoned = torch.where(weights.unsqueeze(1) == 0, torch.nan, p.x)  # values with weight 0 may be anything
    count, mean, mean_low, m2 = op("moments")(poisoned, None, weights, 1)
    assert_within(count, p.forward.batch.count, bound(p.forward.batch.count, torch.float64), "count")
    var = (m2 / count).to(m2.dtype)
    y = op("normalize")(p.x, mean, mean_low, var, p.weight, p.bias, None, None, *p.activation)
    p.check_y(y)
    saved = (p.dy, p.x, None, None, mean, mean_low, var, p.weight, p.bias)
    sum_dz, sum_dz_xhat = op("backward_reduce")(*saved, None, 1, *p.activation)
    gamma = 1.0 if p.weight is None else p.weight.to(var.dtype)
    means = (gamma * sum_dz / count).to(var.dtype), (gamma * sum_dz_xhat / count).to(var.dtype)
    dx, dz = op("backward_apply")(*saved, *means, None, weights, *p.activation, True)
    p.check_gradients(dx, sum_dz_xhat, sum_dz, dz)


@over(ROWS, affine=["affine_by_group", "affine_shared"])
def test_index_gives_each_group_its_own_statistics(op: Ops, case: Case, affine: str) -> None:
    affine_rows = affine == "affine_by_group"
    groups, index = 2, torch.arange(case.shape[0]) % 2
    p = Pass(case, "relu", False, training=True)
    if affine_rows:
        p.weight, p.bias = (None if t is None else torch.stack([t, 2 * t]) for t in (p.weight, p.bias))
    options = {"activation": "relu", "eps": EPS, "index": index.numpy(), "groups": groups}
    p.use(reference.forward_training(wide(p.x), wide(p.weight), wide(p.bias), **options))

    count, mean, mean_low, m2 = op("moments")(p.x, index, None, groups)
    assert_within(count, p.forward.batch.count, np.zeros(groups), "count")
    var = (m2 / count.unsqueeze(1)).to(m2.dtype)
    y = op("normalize")(p.x, mean, mean_low, var, p.weight, p.bias, None, index, *p.activation)
    p.check_y(y)
    saved = (p.dy, p.x, None, None, mean, mean_low, var, p.weight, p.bias)
    by_group = op("backward_reduce")(*saved, index, groups, *p.activation)
    gamma = 1.0 if p.weight is None else p.weight.to(var.dtype)
    means = ((gamma * t / count.unsqueeze(1)).to(var.dtype) for t in by_group)
    dx, dz = op("backward_apply")(*saved, *means, index, None, *p.activation, True)
    sum_dz, sum_dz_xhat = (t if affine_rows and p.forward.weight.ndim == 2 else t.sum(0) for t in by_group)
    p.check_gradients(dx, sum_dz_xhat, sum_dz, dz)


@over(ROWS)
def test_index_gives_each_sample_its_own_affine(op: Ops, case: Case) -> None:
    rows, index = 3, torch.arange(case.shape[0]) % 3
    p = Pass(case, "relu", False, training=True)
    p.weight = torch.arange(1.0, rows + 1).outer(torch.ones(case.shape[1])).to(case.statistics_dtype)
    p.bias = p.weight - 1.5
    weight, bias = wide(p.weight), wide(p.bias)
    options = {"activation": "relu", "eps": EPS, "index": index.numpy()}
    p.use(reference.forward_training(wide(p.x), weight, bias, **options))

    count, mean, mean_low, m2 = op("moments")(p.x, None, None, 1)
    var = (m2 / count).to(m2.dtype)
    y = op("normalize")(p.x, mean, mean_low, var, p.weight, p.bias, None, index, *p.activation)
    p.check_y(y)
    saved = (p.dy, p.x, None, None, mean, mean_low, var, p.weight, p.bias)
    sum_dz, sum_dz_xhat = op("backward_reduce")(*saved, index, rows, *p.activation)
    means = ((p.weight * t).sum(0) / case.m for t in (sum_dz, sum_dz_xhat))
    dx, dz = op("backward_apply")(*saved, *means, index, None, *p.activation, True)
    p.check_gradients(dx, sum_dz_xhat, sum_dz, dz)
    result = op("normalize_backward")(*saved, index, rows, *p.activation, True)
    p.use(reference.normalize(wide(p.x), p.forward.mean, p.forward.var, weight, bias, **options))
    p.check_gradients(*result)


def test_an_empty_group_has_no_values_and_no_effect(op: Ops) -> None:
    x, index = torch.randn(4, 3, 5), torch.tensor([0, 2, 0, 2])
    count, mean, mean_low, m2 = op("moments")(x, index, None, 3)
    assert count.tolist() == [10, 0, 10]
    for statistic in (mean, mean_low, m2):
        assert (statistic[1] == 0).all()
    _, alone, low, deviation = op("moments")(x[index == 2], None, None, 1)
    torch.testing.assert_close(mean[2] + mean_low[2], alone + low)
    torch.testing.assert_close(m2[2], deviation)


def test_a_fully_masked_batch_counts_nothing(op: Ops) -> None:
    x = torch.full((2, 3, 5), torch.nan)
    count, *statistics = op("moments")(x, None, torch.zeros(2, 5), 1)
    assert count == 0
    for statistic in statistics:
        assert (statistic == 0).all()


@pytest.mark.parametrize("case", SEVERAL, ids=ids)
def test_results_keep_the_strides_of_x(case: Case) -> None:
    x, residual, dy = case.x(), case.random(3), case.random(4).contiguous()
    activation = (EPS, "silu", 0.0)
    y, mean, mean_low, var = torch.ops.batchnorm.train_forward(x, None, None, residual, *activation)
    saved = (dy, x, residual, None, mean, mean_low, var, None, None)
    dx, _, _, dz = torch.ops.batchnorm.train_backward(*saved, *activation, True)
    for result in (y, dx, dz):
        assert_like_x(result, x)
    assert_like_x(torch.ops.batchnorm.normalize(x, mean, None, var, None, None, residual, None, *activation), x)
    dx, _, _, dz = torch.ops.batchnorm.normalize_backward(*saved, None, 1, *activation, True)
    applied, applied_dz = torch.ops.batchnorm.backward_apply(*saved, None, None, None, None, *activation, True)
    for result in (dx, dz, applied, applied_dz):
        assert_like_x(result, x)


# Large enough that torch, too, uses several threads.
MANY = [case for case in CASES if case.m * case.shape[1] > 32_768] + [
    Case((2, 3, 90, 91), layout="sliced"),
    Case((2, 3, 90, 91), layout="transposed"),
    Case((4, 2500, 5), torch.float64),
    Case((2, 3, 90, 91), torch.float64),
    Case((33, 1500), torch.bfloat16),
    Case((1, 3, 130, 131), torch.float16, layout="channels_last"),
]


@over(MANY, activation=ACTIVATIONS)
def test_the_bits_do_not_depend_on_threads_or_run(op: Ops, case: Case, activation: str) -> None:
    x, dy = case.x(), case.random(4)
    weight, bias = case.parameters()
    attributes = (EPS, activation, NEGATIVE_SLOPE)

    def everything() -> list[Tensor]:
        y, *statistics = op("train_forward")(x, weight, bias, None, *attributes)
        saved = (dy, x, None, None, *statistics, weight, bias)
        gradients = op("train_backward")(*saved, *attributes, False)
        sums = op("backward_reduce")(*saved, None, 1, *attributes)
        return [y, *statistics, *gradients, *sums, *op("moments")(x, None, None, 1)]

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        for a, b in zip(expected, everything(), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_constant_channel_gives_exactly_beta(op: Ops, layout: str) -> None:
    case = Case((4, 3, 8, 8), layout=layout, values="constant")
    weight, bias = case.parameters()
    y, _, mean_low, var = op("train_forward")(case.x(), weight, bias, None, EPS, "none", 0.0)
    for channel in (0, 2):
        assert (y[:, channel] == bias[channel]).all()
        assert var[channel] == mean_low[channel] == 0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_nonfinite_value_affects_only_its_channel(op: Ops, value: float) -> None:
    x = torch.randn(4, 3, 8, 8)
    x[1, 1, 2, 3] = value
    y, mean, mean_low, var = op("train_forward")(x, None, None, None, EPS, "relu", 0.0)
    assert y[:, 1].isnan().any()
    assert not (mean + mean_low)[1].isfinite()
    for channel in (0, 2):
        assert y[:, channel].isfinite().all()
        assert var[channel].isfinite()


def test_an_empty_batch_has_zero_gradients_of_the_parameters(op: Ops) -> None:
    x = torch.empty(0, 3, 4)
    y, mean, mean_low, var = op("train_forward")(x, torch.ones(3), torch.zeros(3), None, EPS, "relu", 0.0)
    saved = (y, x, None, None, mean, mean_low, var, torch.ones(3), torch.zeros(3))
    dx, dweight, dbias, _ = op("train_backward")(*saved, EPS, "relu", 0.0, False)
    assert dx.shape == x.shape
    assert (dweight == 0).all()
    assert (dbias == 0).all()
