"""DecorrelatedBatchNorm, compared with an eigendecomposition in float64, and its behavior as a layer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close

import batchnorm as bn
from batchnorm.nn.decorrelated import (
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    decorrelated_batch_norm,
)
from batchnorm.ops import whitening, whitening_function
from tests.cases import CASES, EPS, Case, ids
from tests.nn.correlated import correlated, trained
from tests.tolerance import ROUNDINGS, assert_within, bound

Array = NDArray[np.float64]

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


# Against the eigendecomposition


def newton(share: Array, iterations: int) -> tuple[Array, float]:
    """Return p_T of each eigenvalue of Σ_N, and the largest change of p_T for a unit change of an eigenvalue."""
    p, value, slope = np.ones_like(share), 1.0, 0.0
    for _ in range(iterations):
        p = 1.5 * p - 0.5 * p**3 * share
        value, slope = 1.5 * value, 1.5 * slope - 0.5 * value**3  # p_T is convex: steepest at 0
    return p, abs(slope)


def slices(channels: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, channels)) for start in range(0, channels, size)]


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, iterations: int
) -> tuple[Array, Array, Array, Array]:
    """Return y, the terms of its error, mean and packed matrices, in float64 by eigendecomposition."""
    rows = x.double().movedim(1, 0).flatten(1).numpy()
    channels, m = rows.shape
    mean = rows.mean(1) if m else np.zeros(channels)
    centered = rows - mean[:, None]
    y, terms = np.empty_like(rows), np.empty_like(rows)
    packed = np.zeros((channels, min(size, channels)))
    gamma = np.ones(channels) if weight is None else weight.double().numpy()
    beta = np.zeros(channels) if bias is None else bias.double().numpy()
    for group in slices(channels, size):
        d = group.stop - group.start
        covariance = centered[group] @ centered[group].T / max(m, 1) + EPS * np.eye(d)
        trace = np.trace(covariance)
        share, vectors = np.linalg.eigh(covariance / trace)
        p, slope = newton(share, iterations)
        w = (vectors * p) @ vectors.T / np.sqrt(trace)
        packed[group, :d] = w
        y[group] = w @ centered[group]
        # Rounding moves Σ_N, of norm at most 1, and so W√trΣ by at most the slope; then come the mean and the products.
        length = np.linalg.norm(centered[group], axis=0)
        size = np.abs(centered[group])
        size += size.sum(1, keepdims=True) / max(m, 1)
        terms[group] = slope * length / np.sqrt(trace) + np.abs(w) @ size
    y = y * gamma[:, None] + beta[:, None]
    terms = terms * np.abs(gamma)[:, None] + np.abs(beta)[:, None]

    def back(t: Array) -> Array:
        return t.reshape(x.movedim(1, 0).shape).swapaxes(0, 1)

    return back(y), back(terms), mean, packed


@pytest.mark.parametrize(("size", "iterations"), [(64, 5), (2, 3)])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_is_newtons_method_on_the_eigenvalues(case: Case, size: int, iterations: int) -> None:
    x, (weight, bias) = case.x(), case.parameters()
    y, terms, mean, packed = reference(x, weight, bias, size, iterations)
    running = torch.zeros(case.shape[1], dtype=torch.float64), torch.zeros(packed.shape, dtype=torch.float64)
    running = tuple(t.to(case.statistics_dtype) for t in running)
    actual = decorrelated_batch_norm(
        x, *running, weight, bias, True, 1.0, EPS, group_size=size, iterations=iterations
    )  # fmt: skip
    assert actual.dtype == x.dtype
    assert_within(actual, y, bound(terms, case.dtype, y), "y")
    if x.numel():
        spread = np.sqrt((x.double().movedim(1, 0).flatten(1).numpy() - mean[:, None]).__pow__(2).mean(1))
        assert_within(running[0], mean, bound(spread + np.abs(mean), case.statistics_dtype), "running_mean")
        _, slope = newton(np.zeros(1), iterations)
        allowed = ROUNDINGS * slope * np.abs(packed).max() * np.finfo(str(case.statistics_dtype)[6:]).eps
        assert_within(running[1], packed, np.full(packed.shape, allowed), "running_whitening")
    if x.is_contiguous():
        assert actual.is_contiguous()
    if case.layout == "channels_last":
        assert actual.movedim(1, -1).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_gradients_in_lower_precision_are_those_of_float64(dtype: torch.dtype, offset: float) -> None:
    x, dy = (correlated(8, 12, 5, 5) + offset).to(dtype), torch.randn(8, 12, 5, 5).to(dtype)
    found = []
    for wide in (False, True):
        layer = DecorrelatedBatchNorm2d(12, group_size=5, dtype=torch.float64 if wide else torch.float32)
        leaf = (x.double() if wide else x).clone().requires_grad_()
        layer(leaf).backward(dy.to(leaf.dtype))
        found.append([t.double() for t in (leaf.grad, layer.weight.grad, layer.bias.grad)])
    _, slope = newton(np.zeros(1), 5)
    for ours, exact in zip(*found, strict=True):
        arithmetic = ROUNDINGS * slope * torch.finfo(torch.float32).eps / 2
        allowed = (arithmetic + torch.finfo(dtype).eps / 2) * exact.norm()
        assert (ours - exact).norm() <= allowed


LAYOUTS = {
    "samples": (3, 6, 5, 2),
    "channels_last": (3, 6, 5, 2),
    "smaller_last_group": (3, 5, 4, 2),
    "few_positions": (5, 6, 1, 2),
    "no_positions": (12, 6),
    "not_dense": (3, 6, 5, 2),
}


@TRAINING
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_function_computes_what_its_operations_compute(layout: str, masked: bool, training: bool) -> None:
    shape, channels = LAYOUTS[layout], LAYOUTS[layout][1]
    x, dy = correlated(*shape) + 100.0, torch.randn(shape, dtype=torch.float64)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "not_dense":
        x = torch.stack([x, x], -1)[..., 0]
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    weights = torch.rand(shape[0], *shape[2:], dtype=torch.float64) if masked and training else None
    mean, packed = torch.randn(channels, dtype=torch.float64) + 100.0, torch.randn(channels, 3, dtype=torch.float64)
    packed[3:, channels - 3 :] = 0.0  # of a smaller last group
    held = None if training else whitening.Held(mean, packed)
    found = []
    for whiten in (whitening_function.whiten, whitening.whiten):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
        y, _ = whiten(*leaves, weights, held, whitening.Settings(3, EPS, 5), training)
        assert y.stride() == torch.empty_like(x).stride() or whiten is whitening.whiten
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_bits_do_not_depend_on_the_number_of_threads(layout: torch.memory_format) -> None:
    x, dy = (t.contiguous(memory_format=layout) for t in torch.randn(2, 4, 32, 40, 40))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        layer, leaf = DecorrelatedBatchNorm2d(32, group_size=16), x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        found.append([y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_whitening])
    for others in found[1:]:
        for ours, theirs in zip(others, found[0], strict=True):
            assert torch.equal(ours, theirs)


# Its purpose


@pytest.mark.parametrize(("channels", "size"), [(6, 6), (6, 64), (7, 3)])
def test_the_covariance_of_the_output_is_the_identity(channels: int, size: int) -> None:
    x = correlated(512, channels)
    layer = DecorrelatedBatchNorm1d(channels, eps=1e-12, group_size=size, iterations=40, dtype=torch.float64)
    y = layer(x).detach()
    assert y.mean(0).abs().max() < 1e-12
    for group in slices(channels, size):
        covariance = torch.cov(y[:, group].T, correction=0).reshape(group.stop - group.start, -1)
        assert_close(covariance, torch.eye(len(covariance), dtype=torch.float64), rtol=0, atol=1e-9)
    if size < channels:  # and only within a group
        assert torch.cov(y.T)[0, size].abs() > 0.01


def test_the_limit_is_the_symmetric_inverse_square_root() -> None:
    x = correlated(512, 6)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    expected = (x - x.mean(0)) @ (vectors * values.rsqrt()) @ vectors.T
    layer = DecorrelatedBatchNorm1d(6, eps=1e-13, iterations=40, dtype=torch.float64)
    assert_close(layer(x).detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 5, 8])
def test_the_distance_from_the_identity_is_the_error_of_the_iteration(iterations: int) -> None:
    x = correlated(512, 8)
    y = DecorrelatedBatchNorm1d(8, eps=1e-12, iterations=iterations, dtype=torch.float64)(x).detach()
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).numpy()
    share = values / values.sum()
    p, _ = newton(share, iterations)
    actual = torch.linalg.eigvalsh(torch.cov(y.T, correction=0))
    assert_close(actual, torch.from_numpy(np.sort(p**2 * share)), rtol=1e-9, atol=1e-12)
    assert actual.max() <= 1.0 + 1e-12


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-11), (torch.float32, 1e-3)], ids=str)
def test_iterations_stay_where_they_converged(dtype: torch.dtype, allowed: float) -> None:
    q, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    values = torch.logspace(0, -4, 16, dtype=torch.float64)
    covariance = (q * values) @ q.T
    exact = (q * values.rsqrt()) @ q.T
    for iterations in (20, 40):
        found = whitening.inverse_square_root(covariance.to(dtype)[None], iterations)[0]
        assert ((found.double() - exact).norm() / exact.norm()) < allowed
    p, share = torch.eye(16, dtype=torch.float64), covariance / covariance.trace()
    for _ in range(20):  # as published: why ours is another form of it
        p = 1.5 * p - 0.5 * p @ p @ p @ share
    assert not (p - exact * covariance.trace().sqrt()).norm() < 1e3


@TRAINING
def test_a_group_of_one_is_batch_normalization(training: bool) -> None:
    theirs = bn.BatchNorm2d(5, dtype=torch.float64)
    ours = DecorrelatedBatchNorm2d(5, group_size=1, dtype=torch.float64)
    for layer in (ours, theirs):
        layer.train(training)
    x, dy = correlated(4, 5, 3, 3), torch.randn(4, 5, 3, 3, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    if not training:
        theirs.running_var.uniform_(0.5, 2.0)
        ours.load_state_dict(theirs.state_dict())
    for layer, leaf in zip((ours, theirs), leaves, strict=True):
        layer(leaf).backward(dy)
    assert_close(ours(x), theirs(x))
    assert_close(leaves[0].grad, leaves[1].grad)
    assert_close(ours.weight.grad, theirs.weight.grad)


def test_groups_are_whitened_separately_and_the_last_has_the_remaining_channels() -> None:
    x = correlated(6, 10, 5)
    whole = trained(DecorrelatedBatchNorm1d(10, group_size=4, dtype=torch.float64), 6, 10, 5)
    for training in (True, False):
        whole.train(training)
        parts = []
        for group in slices(10, 4):
            part = DecorrelatedBatchNorm1d(group.stop - group.start, dtype=torch.float64).train(training)
            state = {k: v[group] if v.dim() else v for k, v in whole.state_dict().items()}
            state["running_whitening"] = state["running_whitening"][:, : part.num_features]
            part.load_state_dict(state)
            parts.append(part(x[:, group]))
        assert_close(whole(x), torch.cat(parts, 1))


# Running statistics


def test_running_statistics_are_averages_of_mean_and_whitening_matrix() -> None:
    for momentum in (0.3, None):
        layer = DecorrelatedBatchNorm1d(5, momentum=momentum, dtype=torch.float64)
        mean, packed = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
        for number in (1, 2, 3):
            x = correlated(20, 5, seed=number)
            layer(x)
            _, _, batch_mean, batch_packed = reference(x, None, None, 64, 5)
            rate = momentum or 1 / number
            mean = (1 - rate) * mean + rate * torch.from_numpy(batch_mean)
            packed = (1 - rate) * packed + rate * torch.from_numpy(batch_packed)
        assert_close(layer.running_mean, mean)
        assert_close(layer.running_whitening, packed)
        assert layer.num_batches_tracked == 3
        y = layer.eval()(x)
        assert_close(y, (x - mean) @ packed.T)


def test_evaluation_repeats_training_where_the_statistics_are_the_batchs() -> None:
    layer = DecorrelatedBatchNorm2d(5, momentum=1.0, dtype=torch.float64)
    x = correlated(4, 5, 3, 3)
    y = layer(x)
    assert_close(layer.eval()(x), y)


def test_statistics_can_be_kept_unchanged_or_absent() -> None:
    layer = DecorrelatedBatchNorm2d(5)
    x = correlated(4, 5, 3, 3, dtype=torch.float32)
    with bn.update_running_stats(layer, False):
        y = layer(x)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_whitening, torch.eye(5))
    none = DecorrelatedBatchNorm2d(5, track_running_stats=False)
    assert set(none.state_dict()) == {"weight", "bias"}
    assert torch.equal(none(x), y)
    assert torch.equal(none.eval()(x), y)
    layer(x)
    layer.reset_running_stats()
    assert torch.equal(layer.running_whitening, torch.eye(5))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_skip_leaves_running_statistics_after_an_overflow(poison: float) -> None:
    layer = DecorrelatedBatchNorm2d(5, on_nonfinite="skip")
    before = copy.deepcopy(layer.state_dict())
    x = correlated(4, 5, 3, 3, dtype=torch.float16)
    x[0, 1, 0, 0] = poison
    layer(x)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)
    layer(correlated(4, 5, 3, 3, dtype=torch.float16))
    assert layer.num_batches_tracked == 1
    assert layer.running_whitening.isfinite().all()
    other = DecorrelatedBatchNorm2d(5)
    other(x)
    assert not other.running_whitening.isfinite().any()


@pytest.mark.parametrize("shape", [(0, 5, 3, 3), (4, 5, 0, 3)])
@TRAINING
def test_an_empty_batch_gives_an_empty_result_and_updates_nothing(shape: tuple[int, ...], training: bool) -> None:
    layer = DecorrelatedBatchNorm2d(5).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert (layer.weight.grad == 0).all() and (layer.bias.grad == 0).all()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


@TRAINING
def test_no_channels_are_no_error(training: bool) -> None:
    layer = DecorrelatedBatchNorm2d(0).train(training)
    assert layer(torch.randn(2, 0, 4, 4)).shape == (2, 0, 4, 4)


# Gradients and arguments


@pytest.mark.parametrize("training", [False, True])
def test_vectorized_gradients_are_those_of_each_vector(training: bool) -> None:
    x, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 7), (7,)))
    running = torch.zeros(7, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y = decorrelated_batch_norm(x, *running, weight, training=training, group_size=3)
    upstream = torch.randn(2, 9, 7, dtype=torch.float64)

    def gradients(dy: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, weight), dy, retain_graph=True, **options)

    expected = tuple(torch.stack(pair) for pair in zip(*map(gradients, upstream), strict=True))
    assert_close(gradients(upstream, is_grads_batched=True), expected)
    assert_close(torch.func.vmap(gradients)(upstream), expected)


@pytest.mark.parametrize("name", ["weight", "running_mean", "running_whitening"])
def test_every_tensor_must_be_dense(name: str) -> None:
    given = {"weight": torch.ones(4), "running_mean": torch.zeros(4), "running_whitening": torch.eye(4)}
    given[name] = given[name].to_sparse()
    with pytest.raises(ValueError, match=rf"decorrelated_batch_norm expects a dense {name}, got one of layout"):
        decorrelated_batch_norm(torch.randn(8, 4), **given)
