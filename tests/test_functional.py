"""`batchnorm.functional.batch_norm`: torch's function with more precision, an activation and a residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.functional import batch_norm
from tests.cases import ACTIVATIONS, CASES, EPS, SMOOTH, Case, ids

SEVERAL = [case for case in CASES if case.m != 1]

# Relative to the largest value. The float64 reference judges exactness (tests/ops); here: that both compute the same,
# where torch's own sums are good to these digits (its sum of 40,000 rows is not).
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# torch loads its forward-mode formulas through its own deprecated compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", [c for c in SEVERAL if c.values == "normal" and c.m < 30_000], ids=ids)
def test_agrees_with_torch_in_values_gradients_and_running_statistics(case: Case, training: bool) -> None:
    results = []
    for function in (F.batch_norm, batch_norm):
        x = case.x().requires_grad_()
        parameters = [p if p is None else p.requires_grad_() for p in case.parameters()]
        if case.affine == "bias" and function is F.batch_norm:
            parameters[0] = torch.ones_like(parameters[1]).requires_grad_()  # torch ignores a lone bias
        running = [t.to(parameters[0].dtype if parameters[0] is not None else t.dtype) for t in case.running()]
        y = function(x, *running, *parameters, training, 0.3, EPS)
        inputs = [x, *(p for p in parameters if p is not None)]
        gradients = list(torch.autograd.grad(y, inputs, case.random(4)))
        if case.affine == "bias" and function is F.batch_norm:
            del gradients[1]
        results.append([y, *gradients, *running])
    for theirs, ours in zip(*results, strict=True):
        assert theirs.dtype == ours.dtype
        size = theirs.detach().abs().max().item() if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=CLOSE[case.dtype] * max(size, 1.0))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
def test_the_error_is_at_most_that_of_torch_or_of_float32_rounding(layout: str, offset: float) -> None:
    case = Case((64, 8, 32, 32), layout=layout, values="offset", offset=offset)
    x, dy = case.x(), case.random(4)
    outcomes = {}
    for name, function, dtype in (
        ("float64", F.batch_norm, torch.float64),
        ("torch", F.batch_norm, torch.float32),
        ("ours", batch_norm, torch.float32),
    ):
        # Float64 has to take the same offset away first, or it would round too.
        leaf = x.to(dtype) - (offset * torch.arange(1, 9, dtype=dtype).view(-1, 1, 1) if name == "float64" else 0.0)
        leaf = leaf.requires_grad_()
        weight, bias = torch.ones(8, dtype=dtype, requires_grad=True), torch.zeros(8, dtype=dtype, requires_grad=True)
        y = function(leaf, None, None, weight, bias, True, 0.1, EPS)
        outcomes[name] = [t.detach().double() for t in (y, *torch.autograd.grad(y, (leaf, weight, bias), dy.to(dtype)))]
    size = dy.double().abs().transpose(0, 1).flatten(1).sum(1)  # Σ|terms| of dβ and, nearly, of dγ
    allowed = [2e-7 * outcomes["float64"][0].abs().max(), 1e-6 * dy.abs().max(), 2e-7 * size.max(), 2e-7 * size.max()]
    for exact, theirs, ours, rounding in zip(
        outcomes["float64"], outcomes["torch"], outcomes["ours"], allowed, strict=True
    ):
        assert (ours - exact).abs().max() <= max((theirs - exact).abs().max(), rounding)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_first_and_second_derivatives_and_forward_mode(activation: str, training: bool, with_residual: bool) -> None:
    x, weight, bias = double(3, 2, 4), double(2), double(2)
    inputs = (x, weight, bias, *((double(3, 2, 4),) if with_residual else ()))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        running = None if training else torch.tensor([0.1, -0.2], dtype=torch.float64)
        var = None if training else torch.tensor([0.7, 1.3], dtype=torch.float64)
        return batch_norm(
            x,
            running,
            var,
            weight,
            bias,
            training,
            activation=activation,
            negative_slope=0.2,
            alpha=0.7,
            residual=residual,
        )

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_derivatives_without_parameters(missing: str) -> None:
    x, vector = double(4, 3), double(3)

    def function(x: Tensor, vector: Tensor) -> Tensor:
        weight = None if missing in ("weight", "both") else vector
        bias = None if missing in ("bias", "both") else vector
        return batch_norm(x, None, None, weight, bias, True, activation="silu")

    inputs = (x, vector)
    if missing == "both":
        assert torch.autograd.gradcheck(lambda x: function(x, vector), (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda x: function(x, vector), (x,))
    else:
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_third_derivative() -> None:
    x = double(4, 2)

    def second(x: Tensor) -> Tensor:
        y = batch_norm(x, None, None, None, None, True, activation="silu")
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return first

    assert torch.autograd.gradgradcheck(second, (x,))


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_single_needed_gradient_is_the_same(training: bool, needed: str) -> None:
    tensors = {"x": double(5, 3, 4), "weight": double(3), "bias": double(3), "residual": double(5, 3, 4)}
    running = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))

    def gradient(alone: bool) -> Tensor:
        given = {k: t.detach().requires_grad_(k == needed or not alone) for k, t in tensors.items()}
        x, residual = given.pop("x"), given.pop("residual")
        y = batch_norm(x, *running, *given.values(), training, activation="gelu", residual=residual)
        wanted = {"x": x, "residual": residual, **given}[needed]
        return torch.autograd.grad(y.pow(2).sum(), wanted)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


def kept_for_backward(activation: str, with_residual: bool, training: bool = True) -> tuple[set[str], int]:
    """Return the names of the large tensors that autograd keeps, and the number of values in the others."""
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    residual = torch.randn(4, 3, 8, 8, requires_grad=True) if with_residual else None
    weight, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    running = (torch.zeros(3), torch.ones(3))
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm(x, *running, weight, bias, training, activation=activation, residual=residual)
    names = {t.data_ptr(): name for name, t in (("x", x), ("residual", residual), ("y", y)) if t is not None}
    large = {names[t.data_ptr()] for t in saved if t.numel() == x.numel()}
    return large, sum(t.numel() for t in saved if t.numel() != x.numel())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd_keeps_x_and_vectors_and_with_a_residual_one_tensor_more(activation: str, training: bool) -> None:
    large, vectors = kept_for_backward(activation, False, training)
    assert large == {"x"}
    assert vectors <= 5 * 3
    one_more = set() if activation == "none" else {"residual"} if activation in SMOOTH else {"y"}
    assert kept_for_backward(activation, True, training)[0] == {"x"} | one_more


def test_a_leaky_slope_that_hides_the_sign_keeps_the_residual() -> None:
    x, residual = double(4, 2), double(4, 2)
    for slope in (-0.5, 0.0, 0.5):
        assert torch.autograd.gradcheck(
            lambda x, r, s=slope: batch_norm(
                x, None, None, training=True, activation="leaky_relu", negative_slope=s, residual=r
            ),
            (x, residual),
        )


def test_statistics_may_be_written_to_before_backward() -> None:
    for training in (True, False):
        x, weight = double(4, 2), double(2)
        mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        y = batch_norm(x, mean, var, weight, None, training)
        expected = torch.autograd.grad(y.pow(2).sum(), (x, weight), retain_graph=True)
        mean.fill_(7.0)
        var.fill_(9.0)
        for ours, theirs in zip(torch.autograd.grad(y.pow(2).sum(), (x, weight)), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_zero_eps_is_allowed_in_evaluation_as_in_torch() -> None:
    x, mean, var = torch.randn(4, 2), torch.zeros(2), torch.ones(2)
    torch.testing.assert_close(batch_norm(x, mean, var, eps=0.0), F.batch_norm(x, mean, var, eps=0.0))


def test_momentum_outside_zero_to_one_is_allowed_as_in_torch() -> None:
    x, ours, theirs = torch.randn(4, 2), (torch.zeros(2), torch.ones(2)), (torch.zeros(2), torch.ones(2))
    batch_norm(x, *ours, training=True, momentum=1.7)
    F.batch_norm(x, *theirs, training=True, momentum=1.7)
    torch.testing.assert_close(ours, theirs)


def test_an_empty_batch_gives_an_empty_result_and_updates_nothing() -> None:
    x, weight = torch.empty(0, 2, 3, requires_grad=True), torch.ones(2, requires_grad=True)
    mean, var, batches = torch.zeros(2), torch.ones(2), torch.tensor(0)
    y = batch_norm(x, mean, var, weight, None, True, momentum=None, num_batches_tracked=batches)
    y.sum().backward()
    assert y.shape == x.shape
    assert (weight.grad == 0).all()
    assert batches == 0
    assert (mean == 0).all()
    assert (var == 1).all()


VECTOR = torch.ones(3)
X = torch.randn(4, 3, 5)

MISTAKES = {
    "no tensor": ({"input": [1.0]}, TypeError, r"batch_norm expects x to be a torch.Tensor, got list. Convert it"),
    "integers": ({"input": X.long()}, TypeError, r"expects x of a floating-point dtype, got torch.int64. .*x.float"),
    "one dim": ({"input": X[0, 0]}, ValueError, r"expects x of shape \[N, C, \*\], got \[5\] \(1 dims\). Add"),
    "one value": (
        {"input": X[:1, :, 0]},
        ValueError,
        r"more than one value per channel in training, got x of shape \[1, 3",
    ),
    "eps": ({"eps": 0.0}, ValueError, r"expects eps > 0, got 0.0. .*1e-5"),
    "tiny eps": ({"eps": 5e-324}, ValueError, r"expects eps of at least 1e-70, got 5e-324. .*1e-5"),
    "negative eps": ({"eps": -1e-5, "training": False}, ValueError, r"expects eps > 0, got -1e-05"),
    "nan eps": ({"eps": float("nan")}, ValueError, r"expects eps > 0, got nan"),
    "weight": (
        {"weight": torch.ones(5)},
        ValueError,
        r"weight of shape \[C\] = \[3\] for x of shape \[4, 3, 5\], got \[5\]. Channels must be the second",
    ),
    "bias": (
        {"bias": torch.ones(4)},
        ValueError,
        r"expects bias of shape \[C\] = \[3\] .* got \[4\]. Give the layer num_features=3",
    ),
    "running": ({"running_mean": torch.ones(2)}, ValueError, r"expects running_mean of shape"),
    "weight dtype": (
        {"weight": VECTOR.double()},
        TypeError,
        r"expects weight in torch.float32 for x in torch.float32, got torch.float64",
    ),
    "half dtype": (
        {"input": X.half(), "bias": VECTOR.bfloat16()},
        TypeError,
        r"expects bias in torch.float16 or torch.float32 for x in torch.float16",
    ),
    "device": (
        {"weight": VECTOR.to("meta")},
        ValueError,
        r"expects weight on x's device, got weight on meta and x on cpu",
    ),
    "residual": (
        {"residual": X[:1]},
        ValueError,
        r"expects a residual of x's shape \[4, 3, 5\], got \[1, 3, 5\]. .*expand",
    ),
    "residual dtype": (
        {"residual": X.double()},
        TypeError,
        r"expects a residual of x's dtype and device .*residual.to\(x\)",
    ),
    "activation": (
        {"activation": "swish"},
        ValueError,
        r"expects activation to be one of 'none', 'relu', .* got 'swish'. Choose",
    ),
    "alpha": ({"alpha": float("nan")}, ValueError, r"expects alpha to be a finite number, got nan. .*is 1."),
    "on_nonfinite": (
        {"on_nonfinite": "ignore"},
        ValueError,
        r"expects on_nonfinite to be one of 'propagate', 'skip', 'error', got 'ignore'",
    ),
    "one running": ({"running_var": None}, ValueError, r"both or neither, got running_mean without running_var"),
    "no running": (
        {"running_mean": None, "running_var": None, "training": False},
        ValueError,
        r"expects running_mean and running_var in evaluation, got None",
    ),
    "no counter": ({"momentum": None}, ValueError, r"expects num_batches_tracked if momentum is None"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_an_error_and_changes_nothing(mistake: str) -> None:
    wrong, kind, message = MISTAKES[mistake]
    mean, var = torch.zeros(3), torch.ones(3)
    arguments = {"input": X, "running_mean": mean, "running_var": var, "weight": VECTOR, "training": True} | wrong
    with pytest.raises(kind, match=message):
        batch_norm(**arguments)
    assert (mean == 0).all()
    assert (var == 1).all()
