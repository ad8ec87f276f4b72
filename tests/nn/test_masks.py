"""Masks: masked values do not affect the statistics, and are normalized like the rest."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import nn, ops, reference
from batchnorm.functional import batch_norm
from tests.cases import CASES, EPS, Case, ids
from tests.tolerance import Terms, assert_within, bound

# torch loads its forward-mode formulas through its own deprecated compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

SHAPES = {1: (6, 3, 5), 2: (5, 3, 4, 3), 3: (3, 3, 2, 4, 3)}
PADDED = [case for case in CASES if case.m > 3]


def positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:])


def some(shape: tuple[int, ...], kind: str = "boolean", seed: int = 9) -> Tensor:
    """Return a mask that counts about two thirds of the positions, and at least two."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(positions(shape), generator=generator) < 0.67
    mask.view(-1)[:2] = True
    if kind == "boolean":
        return mask
    return mask * torch.empty(positions(shape)).uniform_(0.2, 3.0, generator=generator)


def wide(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy().copy()  # not the memory of t itself


@pytest.mark.parametrize("kind", ["boolean", "weights"])
@pytest.mark.parametrize("case", PADDED, ids=ids)
def test_agrees_with_the_reference(case: Case, kind: str) -> None:
    x, dy, (weight, bias) = case.x().requires_grad_(), case.random(4), case.parameters()
    affine = [p for p in (weight, bias) if p is not None]
    for p in affine:
        p.requires_grad_()
    mask = some(case.shape, kind)
    running_mean, running_var = case.running()
    old = wide(running_mean), wide(running_var)
    y = batch_norm(x, running_mean, running_var, weight, bias, True, 0.3, EPS, mask=mask)
    gradients = torch.autograd.grad(y, (x, *affine), dy)

    expected = reference.forward_training(wide(x), wide(weight), wide(bias), weights=wide(mask), eps=EPS)
    terms = Terms(expected, None, wide(bias))
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    assert_within(y, expected.y, bound(terms.z, case.dtype, expected.y), "y")
    backward, dz = reference.backward(wide(dy), expected), np.abs(wide(dy))
    sum_dz, sum_dz_xhat = terms.sums(dz, like=expected.weight)
    wanted = [(backward.dx, bound(terms.dx(dz), case.dtype, backward.dx))]
    for p, value, size in ((weight, backward.dweight, sum_dz_xhat), (bias, backward.dbias, sum_dz)):
        if p is not None:
            wanted.append((value, bound(size, p.dtype, value)))
    for name, got, (value, allowed) in zip(("dx", "dγ or dβ", "dβ"), gradients, wanted, strict=False):
        assert_within(got, value, allowed, name)

    running = reference.update_running(*old, expected.batch, momentum=0.3, convention="torch")
    mean_terms = np.abs(old[0]) + np.abs(running.mean) + terms.deviation()
    assert_within(running_mean, running.mean, bound(mean_terms, running_mean.dtype), "running_mean")
    assert_within(running_var, running.var, bound(running.var, running_var.dtype), "running_var")


@pytest.mark.parametrize("lazy", [False, True], ids=["layer", "lazy"])
@pytest.mark.parametrize("digit", [1, 2, 3])
def test_agrees_with_the_same_values_packed(digit: int, lazy: bool) -> None:
    shape = SHAPES[digit]
    padded = getattr(nn, f"{'Lazy' * lazy}BatchNorm{digit}d")(*() if lazy else (3,), dtype=torch.float64)
    packed = nn.BatchNorm1d(3, dtype=torch.float64)
    mask = some(shape)
    for number in (1, 2):
        x, dy = torch.randn(2, *shape, dtype=torch.float64)
        dy = dy * mask.unsqueeze(1)  # the loss does not look at padding
        outcomes = []
        for layer, pick in ((padded, lambda t: t), (packed, lambda t: t.movedim(1, -1)[mask])):
            leaf = x.clone().requires_grad_()
            y = layer(leaf, mask) if layer is padded else layer(pick(leaf))
            layer.zero_grad()
            y.backward(pick(dy))
            outcomes.append([leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
            outcomes[-1].append(y.movedim(1, -1)[mask] if layer is padded else y)
        torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-11, atol=1e-12)
        assert padded.num_batches_tracked == number


def test_padding_does_not_dilute_the_mean() -> None:
    # TensorFlow once reported 1.5 here.
    layer = nn.BatchNorm1d(1, momentum=None)
    x = torch.tensor([[[2.0, 4.0, 0.0, 0.0]]])
    layer(x, torch.tensor([[True, True, False, False]]))
    assert layer.running_mean.item() == 3.0
    assert layer.running_var.item() == 2.0


@pytest.mark.parametrize("shape", [(1, 4, 3), (5, 1, 3), (5, 4, 1), (1, 1, 3), (5, 1, 1), (4, 3), (3,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
def test_a_mask_broadcasts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, mask = torch.randn(5, 2, 4, 3), torch.ones(shape, dtype=dtype)
    mask.view(-1)[-1] = mask.numel() == 1
    full = mask.expand(5, 4, 3).contiguous()
    assert torch.equal(nn.BatchNorm2d(2)(x, mask), nn.BatchNorm2d(2)(x, full))


def test_a_full_mask_is_no_mask() -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    masked, plain = nn.BatchNorm2d(3, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
    torch.testing.assert_close(masked(x, torch.ones(4, 5, 5, dtype=torch.bool)), plain(x), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(masked.state_dict(), plain.state_dict(), rtol=1e-13, atol=1e-13)


def test_whole_weights_are_repetitions() -> None:
    x, times = torch.randn(4, 3, dtype=torch.float64), torch.tensor([2, 1, 3, 0])
    y = batch_norm(x, None, None, training=True, mask=times)
    again = batch_norm(x.repeat_interleave(times, 0), None, None, training=True)
    torch.testing.assert_close(y[:3].repeat_interleave(times[:3], 0), again, rtol=1e-12, atol=1e-12)


def test_weights_have_no_scale() -> None:
    x, w = torch.randn(64, 3), torch.rand(64) + 0.1
    small, large = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    torch.testing.assert_close(small(x, w), large(x, w * 1000))
    torch.testing.assert_close(small.state_dict(), large.state_dict())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_fully_masked_batch_updates_nothing_and_stays_finite(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    layer = nn.BatchNorm2d(3)
    if dtype == torch.float64:
        layer.double()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3, 5, 5, dtype=dtype, requires_grad=True)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = call(x, torch.zeros(4, 5, 5, dtype=torch.bool))
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_single_counted_value_gives_beta_and_updates_only_the_mean(weight: float) -> None:
    layer = nn.BatchNorm1d(2, dtype=torch.float64)
    torch.nn.init.uniform_(layer.bias)
    x = torch.randn(4, 2, dtype=torch.float64)
    y = layer(x, torch.tensor([0.0, 0.0, weight, 0.0], dtype=torch.float64))
    assert torch.equal(y[2], layer.bias)
    assert y.isfinite().all()
    torch.testing.assert_close(layer.running_mean, 0.1 * x[2])
    assert torch.equal(layer.running_var, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -torch.inf])
def test_padding_may_hold_anything(padding: float, compiled: bool, layout: Any) -> None:
    torch._dynamo.reset()
    mask = some((4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5).contiguous(memory_format=layout)
    zeros = x.masked_fill(~mask.unsqueeze(1), 0.0)
    anything = x.masked_fill(~mask.unsqueeze(1), padding)
    dy = torch.randn_like(x) * mask.unsqueeze(1)
    outcomes = []
    for values in (zeros, anything):
        layer, leaf = nn.BatchNorm2d(3), values.clone().requires_grad_()
        y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(leaf, mask)
        y.backward(dy)
        gradient = leaf.grad.masked_fill(~mask.unsqueeze(1), 0.0)
        outcomes.append([y, gradient, *(p.grad for p in layer.parameters()), *layer.buffers()])
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padding", [0.0, torch.nan, torch.inf, -torch.inf])
def test_a_mask_copies_x_only_to_clear_what_is_not_finite(padding: float) -> None:
    mask = some((4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5).masked_fill(~mask.unsqueeze(1), padding).requires_grad_()
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        nn.BatchNorm2d(3)(x, mask)
    assert (x.data_ptr() in kept) == (padding == 0.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nonfinite_value_that_counts_is_visible(value: float) -> None:
    x, mask = torch.randn(4, 3), torch.tensor([True, True, True, False])
    x[0] = value
    layer = nn.BatchNorm1d(3)
    assert layer(x, mask).isnan().all()
    assert layer.running_mean.isfinite().logical_not().all()
    skipping = nn.BatchNorm1d(3, on_nonfinite="skip")
    skipping(x, mask)
    assert skipping.num_batches_tracked == 0
    refusing = nn.BatchNorm1d(3, on_nonfinite="error")
    with pytest.raises(FloatingPointError, match=r"in 3 of 3 channels \(0, 1, 2\). x has NaN or infinity"):
        refusing(x, mask)
    refusing(x, ~mask | torch.tensor([False, True, True, False]))
    assert refusing.num_batches_tracked == 1


@pytest.mark.parametrize("on_single", ["error", "running"])
def test_statistics_that_are_not_those_of_the_batch_raise_no_error(on_single: str) -> None:
    layer = nn.BatchNorm1d(3, on_nonfinite="error", on_single=on_single)
    layer.running_var.fill_(torch.nan)
    layer(torch.randn(4, 3), torch.zeros(4, dtype=torch.bool))
    assert layer.num_batches_tracked == 0


def test_gradients_reach_masked_positions() -> None:
    # They do not count, so none flows through the statistics: dx = γ·dy/σ.
    x, mask = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.arange(6) < 4
    dy = torch.randn(6, 2, dtype=torch.float64)
    batch_norm(x, None, None, training=True, mask=mask).backward(dy)
    sigma = (x[:4].var(0, correction=0) + EPS).sqrt()
    torch.testing.assert_close(x.grad[4:], (dy / sigma)[4:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["boolean", "weights"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_first_and_second_derivatives_and_forward_mode(kind: str, activation: str) -> None:
    x, residual = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True).unbind()
    weight, bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True).unbind()
    mask = some((4, 2, 3), kind)

    def f(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return batch_norm(
            x, None, None, weight, bias, True, mask=mask, activation=activation, residual=residual, eps=1e-3
        )

    assert torch.autograd.gradcheck(f, (x, weight, bias, residual), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, weight, bias, residual))


def test_per_sample_gradients_under_vmap() -> None:
    weight, mask = torch.rand(2, dtype=torch.float64), some((4, 2, 3))
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, training=True, mask=mask).pow(3).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    one_by_one = torch.stack([torch.func.grad(loss)(weight, one) for one in x])
    torch.testing.assert_close(together, one_by_one)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph_for_every_batch_size(backend: str) -> None:
    torch._dynamo.reset()
    plain = nn.BatchNorm2d(3, dtype=torch.float64)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for n in (4, 5, 7):
        x, mask = torch.randn(n, 3, 5, 4, dtype=torch.float64), some((n, 3, 5, 4))
        outcomes = []
        for call, module in ((plain, plain), (compiled, layer)):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf, mask)
            y.pow(3).sum().backward()
            outcomes.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-11, atol=1e-11)


def test_a_mask_changes_nothing_in_evaluation() -> None:
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    layer(x)
    layer.eval()
    assert torch.equal(layer(x, some((4, 3, 5, 5))), layer(x))


def test_batch_statistics_in_evaluation_are_masked_too() -> None:
    layer, x = nn.BatchNorm1d(3, track_running_stats=False).eval(), torch.randn(4, 3)
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(layer(x, mask)[:3], layer(x[:3]))


def test_the_fused_layer_computes_the_same_as_its_parts() -> None:
    x, residual, mask = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), some((4, 3, 5, 5))
    fused, plain = nn.BatchNormAct2d(3), nn.BatchNorm2d(3)
    torch.testing.assert_close(fused(x, residual, mask=mask), torch.relu(plain(x, mask) + residual))
    torch.testing.assert_close(fused.running_var, plain.running_var, rtol=0, atol=0)


def test_a_mask_is_an_argument_of_the_fx_node() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)

    model, x, mask = Network(), torch.randn(4, 3, 5, 5), some((4, 3, 5, 5))
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert torch.equal(traced(x, mask), model(x, mask))


def test_export_takes_a_mask_in_evaluation_and_refuses_it_in_training() -> None:
    layer, x, mask = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5), some((4, 3, 5, 5))
    layer(x, mask)
    exported = torch.export.export(layer.eval(), (x, mask)).module()
    torch.testing.assert_close(exported(x, mask), layer(x))
    with pytest.raises(ValueError, match=r"expects no mask in an exported training graph, got one"):
        torch.export.export(layer.train(), (x, mask))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(4, 3, 5), ValueError, r"BatchNorm2d expects a mask of shape \[N, \*S\] = \[4, 5, 6\] \(or broad"
                                          r".*got \[4, 3, 5\]. It has no channel dimension"),
        (torch.ones(4, 3, 5, 6), ValueError, r"It has no channel dimension"),
        (torch.full((4, 5, 6), 1e37), ValueError, r"expects the largest weight .* from 1e-15 to 1e\+15, got 1e\+37"),
        (torch.full((4, 5, 6), 1e-30), ValueError, r"largest weight .* got 1e-30\. .* use mask / mask.max\(\)"),
        (torch.ones(4, 5, 6) - 1.5, ValueError, r"expects a mask of finite weights >= 0, got values from -0.5"),
        (torch.full((4, 5, 6), torch.nan), ValueError, r"got values from nan to nan"),
        (torch.full((4, 1, 1), torch.inf), ValueError, r"got values from inf to inf"),
        (torch.ones(4, 5, 6, dtype=torch.complex64), TypeError, r"expects a mask of booleans or of weights, got torch"),
        (3, TypeError, r"expects a mask of booleans or of weights, got int"),
        (torch.ones(4, 5, 6, device="meta"), ValueError, r"expects the mask on x's device, got mask on meta"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_wrong_mask_raises_an_error_and_changes_nothing(
    mask: Any, error: type[Exception], message: str, training: bool
) -> None:
    layer = nn.BatchNorm2d(3).train(training)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 3, 5, 6), mask)
    assert layer.num_batches_tracked == 0


def test_a_mask_that_fits_in_two_ways_is_refused() -> None:
    x = torch.randn(4, 3, 5, 4)
    with pytest.raises(ValueError, match=r"Use mask.reshape\(-1, 1, 1\) for one value per sample, or mask.unsqueeze"):
        nn.BatchNorm2d(3)(x, torch.ones(4))
    nn.BatchNorm1d(3)(torch.randn(4, 3), torch.ones(4))


def test_without_a_mask_the_fused_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the way for masks")

    monkeypatch.setattr(ops, "batch_moments", refuse)
    nn.BatchNorm2d(3)(torch.randn(4, 3, 5, 5))
