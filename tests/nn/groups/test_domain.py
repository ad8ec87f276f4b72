"""Domain batch normalization: one `BatchNorm` for each domain, in one pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm import functional, reference
from batchnorm.nn.domain import (
    DomainBatchNorm,
    DomainBatchNorm1d,
    DomainBatchNorm2d,
    DomainBatchNorm3d,
)
from tests.cases import CASES, Case, ids
from tests.nn.groups.by_rows import assert_agrees_with_the_reference, randomized, step_results, wide
from tests.tolerance import assert_within

# torch's compiler and its forward-mode rules script functions of their own at first use, and warn themselves of it.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

SHAPES = {
    DomainBatchNorm: (9, 3, 2, 3, 2, 2),
    DomainBatchNorm1d: (9, 3, 5),
    DomainBatchNorm2d: (9, 3, 5, 6),
    DomainBatchNorm3d: (9, 3, 2, 5, 6),
}
LAYERS = pytest.mark.parametrize("kind", SHAPES)
DOMAINS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 0, 1])
OPTIONS = [
    {},
    {"affine_per_domain": True},
    {"affine_per_domain": True, "bias": False},
    {"affine": False},
    {"momentum": None, "eps": 1e-3},
    {"track_running_stats": False},
    {"on_nonfinite": "skip"},
]


def make(kind: type[DomainBatchNorm] = DomainBatchNorm2d, **options: Any) -> DomainBatchNorm:
    layer = kind(3, num_domains=3, **{"dtype": torch.float64, **options})
    return randomized(layer)


def option_id(options: dict[str, object]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


def clear_gradients(layers: list[nn.Module]) -> None:
    for layer in layers:
        layer.zero_grad()


def assert_is_separate_layers(layer: DomainBatchNorm, separate: list[nn.Module], x: Tensor, domain: Any) -> None:
    """Check that outputs, gradients and buffers agree with one layer per domain, called with its part of the batch."""
    clear_gradients([layer, *separate])
    leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    dy = torch.randn_like(x)
    y = layer(leaf, domain)
    y.backward(dy)
    rows = domain if isinstance(domain, Tensor) else torch.full((x.shape[0],), domain)
    rows = rows.expand(x.shape[0])
    for k, one in enumerate(separate):
        if (rows == k).any():
            its = one(again[rows == k])
            assert_close(y[rows == k], its, rtol=1e-12, atol=1e-12)
            its.backward(dy[rows == k])
    assert_close(leaf.grad, again.grad, rtol=1e-11, atol=1e-12)
    for name, parameter in layer.named_parameters():
        theirs = [getattr(one, name).grad for one in separate]
        theirs = [torch.zeros(3, dtype=x.dtype) if grad is None else grad for grad in theirs]
        expected = torch.stack(theirs) if parameter.dim() == 2 else sum(theirs)
        assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-11)
    for name, buffer in layer.named_buffers():
        expected = torch.stack([getattr(one, name) for one in separate])
        assert_close(buffer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@LAYERS
def test_is_one_batch_norm_for_each_domain(kind: type[DomainBatchNorm], options: dict[str, Any]) -> None:
    layer = make(kind, **options)
    separate: list[nn.Module] = [layer.select(k) for k in range(3)]
    for step, domain in enumerate((DOMAINS, 1, torch.tensor(2), DOMAINS * 0 + 1, DOMAINS // 2, DOMAINS, 0)):
        for module in (layer, *separate):
            module.train(step < 5)
        assert_is_separate_layers(layer, separate, torch.randn(SHAPES[kind], dtype=torch.float64) + 3, domain)
    if layer.num_batches_tracked is not None:  # randomized to 3, 4, 5
        assert layer.num_batches_tracked.tolist() == [3 + 2, 4 + 4, 5 + 2]


@pytest.mark.parametrize("case", [case for case in CASES if case.shape[0] > 3 and case.m > 8], ids=ids)
@pytest.mark.parametrize("affine_per_domain", [False, True], ids=["shared", "per_domain"])
def test_agrees_with_the_reference(case: Case, affine_per_domain: bool) -> None:
    index = torch.arange(case.shape[0]) % 2
    layer = DomainBatchNorm(case.shape[1], num_domains=2, affine_per_domain=affine_per_domain)
    layer.weight, layer.bias = (
        t if t is None else nn.Parameter(torch.stack([t, 2 * t]) if affine_per_domain else t) for t in case.parameters()
    )
    assert_agrees_with_the_reference(case, layer, layer.weight, layer.bias, index, lambda x: layer(x, index), groups=2)


@pytest.mark.parametrize("case", [case for case in CASES if case.shape[0] > 3 and case.m > 8][:8], ids=ids)
def test_running_statistics_agree_with_the_reference(case: Case) -> None:
    index = torch.arange(case.shape[0]) % 2
    dtype = case.statistics_dtype
    layer = DomainBatchNorm(case.shape[1], num_domains=3, momentum=0.25, dtype=dtype)
    layer(case.x(), index)
    found = reference.moments(wide(case.x()), index=index.numpy(), groups=3)
    unbiased = found.var * (found.count / (found.count - 1))[:, None]
    terms = abs(found.mean) + found.var**0.5 + 1
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-22
    assert_within(layer.running_mean[:2], 0.25 * found.mean[:2], unit * terms[:2], "running_mean")
    assert_within(layer.running_var[:2], 0.75 + 0.25 * unbiased[:2], unit * (1 + unbiased[:2]), "running_var")
    assert (layer.running_mean[2] == 0).all()
    assert (layer.running_var[2] == 1).all()
    assert layer.num_batches_tracked.tolist() == [1, 1, 0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("affine_per_domain", [False, True], ids=["shared", "per_domain"])
@pytest.mark.parametrize("domain", [DOMAINS[:5], 1], ids=["per_sample", "int"])
def test_first_and_second_derivatives(training: bool, affine_per_domain: bool, domain: Any) -> None:
    layer = make(affine_per_domain=affine_per_domain).train(training)
    x = torch.randn(5, 3, 2, 1, dtype=torch.float64, requires_grad=True)
    layer.update_running_stats = False

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, domain))

    inputs = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs)


def test_second_derivatives_agree_with_the_reference() -> None:
    layer, x = make(affine_per_domain=True), torch.randn(9, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x).requires_grad_()
    parameters = (layer.weight, layer.bias)
    first = torch.autograd.grad(layer(x, DOMAINS), (x, *parameters), dy, create_graph=True)
    upstream = [torch.randn_like(t) for t in first]
    found = torch.autograd.grad(first, (dy, x, layer.weight), upstream)
    forward = reference.forward_training(
        wide(x), wide(layer.weight), wide(layer.bias), index=DOMAINS.numpy(), groups=3, eps=layer.eps
    )
    expected = reference.double_backward(*map(wide, upstream), wide(dy), forward)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("domain", [DOMAINS, 1], ids=["per_sample", "int"])
def test_under_torch_func(training: bool, domain: Any) -> None:
    layer, x = make().train(training), torch.randn(9, 3, 2, 2, dtype=torch.float64)
    layer.update_running_stats = False

    def loss(x: Tensor) -> Tensor:
        return layer(x, domain).pow(3).sum()

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    assert_close(torch.func.grad(loss)(x), leaf.grad)


# Single values, empty batches and domains, what is not finite


def test_a_domain_with_one_value_gives_its_bias_and_updates_only_the_mean() -> None:
    layer = make(DomainBatchNorm1d, affine_per_domain=True, momentum=0.5)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, torch.tensor([0, 1, 0, 0]))
    assert_close(y[1], layer.bias[1], rtol=0, atol=0)
    y.backward(torch.randn_like(y))
    assert_close(x.grad[1], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(layer.running_mean[1], (before["running_mean"][1] + x[1].detach()) / 2)
    assert torch.equal(layer.running_var[1], before["running_var"][1])
    assert (layer.num_batches_tracked - before["num_batches_tracked"]).tolist() == [1, 1, 0]


def test_a_single_value_in_the_batch_is_refused() -> None:
    layer = make(DomainBatchNorm1d)
    for domain in (1, torch.tensor([1])):
        with pytest.raises(ValueError, match="DomainBatchNorm1d expects more than one value per channel in training"):
            layer(torch.randn(1, 3, dtype=torch.float64), domain)
    assert layer.eval()(torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])).shape == (1, 3)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("domain", [torch.empty(0, dtype=torch.int64), 1], ids=["per_sample", "int"])
def test_an_empty_batch_updates_nothing(training: bool, domain: Any) -> None:
    layer = make(affine_per_domain=True).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    layer(x, domain).sum().backward()
    assert x.grad.shape == x.shape
    assert (layer.weight.grad == 0).all()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_skip_leaves_only_the_domain_that_overflowed() -> None:
    layer = DomainBatchNorm2d(3, num_domains=2, on_nonfinite="skip")
    x = torch.randn(4, 3, 2, 2)
    x[1, 0] = torch.inf
    y = layer(x, torch.tensor([0, 1, 0, 1]))
    assert y[::2].isfinite().all()
    assert layer.num_batches_tracked.tolist() == [1, 0]
    assert (layer.running_mean[1] == 0).all()


def test_a_mask_leaves_positions_out_of_each_domain() -> None:
    layer = make()
    separate = [layer.select(k) for k in range(3)]
    x, mask = torch.randn(9, 3, 4, 4, dtype=torch.float64), torch.rand(9, 4, 4) < 0.6
    y = layer(x, DOMAINS, mask=mask)
    for k, one in enumerate(separate):
        assert_close(y[k == DOMAINS], one(x[k == DOMAINS], mask=mask[k == DOMAINS]), rtol=1e-12, atol=1e-12)
        assert_close(layer.running_var[k], one.running_var, rtol=1e-12, atol=1e-12)
    assert_close(layer(x, 1, mask=mask), separate[1](x, mask=mask), rtol=1e-12, atol=1e-12)


def test_updates_of_running_statistics_can_be_turned_off() -> None:
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    layer.update_running_stats = False
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    assert_close(layer(x, DOMAINS)[DOMAINS == 1], functional.batch_norm(
        x[DOMAINS == 1], None, None, layer.weight, layer.bias, training=True))  # fmt: skip
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_is_a_batch_norm_and_describes_itself() -> None:
    layer = DomainBatchNorm2d(3, num_domains=2, affine_per_domain=True)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, torch.nn.BatchNorm2d)
    assert repr(layer).endswith("track_running_stats=True, num_domains=2, affine_per_domain=True)")
    layer.reset_parameters()
    assert layer.weight.shape == layer.running_var.shape == (2, 3)
    assert DomainBatchNorm2d(3, num_domains=2, device="meta").running_mean.is_meta


# Checkpointing, compilation, tracing, export


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_updates_once_with_an_argument(reentrant: bool) -> None:
    plain = make()
    layer, x = copy.deepcopy(plain), torch.randn(9, 3, 2, 2, dtype=torch.float64)
    for domain in (DOMAINS, 1):
        plain.zero_grad(), layer.zero_grad()
        expected = step_results(plain, lambda m, x, d=domain: m(x, d), x)
        found = step_results(layer, lambda m, x, d=domain: checkpoint(m, x, d, use_reentrant=reentrant), x)
        assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("domain", [DOMAINS, 1], ids=["per_sample", "int"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend: str, domain: Any, training: bool) -> None:
    layer = make(affine_per_domain=True, momentum=None).train(training)
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, backend=backend, fullgraph=True)
    for _ in range(2):
        x = torch.randn(9, 3, 4, 4, dtype=torch.float64)
        clear_gradients([layer, again])
        expected = step_results(layer, lambda m, x: m(x, domain), x)
        found = step_results(again, lambda m, x: compiled(x, domain), x)
        assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_sample", [True, False])
def test_is_one_node_of_an_fx_graph(per_sample: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make()

        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            return self.norm(x, domain if per_sample else 1).relu()

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 1
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    again = copy.deepcopy(model)
    assert_close(traced(x, DOMAINS), again(x, DOMAINS))
    assert_close(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("domain", [DOMAINS, 1], ids=["per_sample", "int"])
def test_an_exported_layer_needs_no_operator_of_ours(domain: Any) -> None:
    layer = make(affine_per_domain=True).eval()
    x = torch.randn(9, 3, 2, 2, dtype=torch.float64)
    program = torch.export.export(layer, (x, domain))
    assert "batchnorm" not in str(program.graph)
    assert_close(program.module()(x, domain), layer(x, domain))


# Mistakes


@pytest.mark.parametrize(
    ("domain", "error", "message"),
    [
        (3, ValueError, r"DomainBatchNorm2d expects domain in \[0, 3\), got 3. Count from 0"),
        (-1, ValueError, r"domain in \[0, 3\), got -1"),
        (True, TypeError, r"expects domain to be an int or an int64 tensor \[N\], got True \(bool\). Pass int"),
        ("real", TypeError, r"got 'real' \(str\)"),
        (torch.tensor([0, 1, 3, 0]), ValueError, r"domain in \[0, 3\), got 3. Count from 0"),
        (torch.tensor([0, -2, 3, 0]), ValueError, r"domain in \[0, 3\), got -2"),
        (torch.tensor([0.0, 1, 2, 0]), TypeError, r"domain of dtype torch.int64, got torch.float32. Use domain.long"),
        (torch.tensor([0, 1]), ValueError, r"domain of shape \[N\] = \[4\] for x of shape \[4, 3, 2, 2\], got \[2\]"),
        (
            torch.zeros(4, 1).long(),
            ValueError,
            r"domain of shape \[N\] = \[4\].*got \[4, 1\]. Pass one domain for each",
        ),
        (torch.zeros(4, device="meta").long(), ValueError, r"domain on x's device, got domain on meta .* Move it"),
    ],
)
def test_a_wrong_domain_raises_an_error_and_changes_nothing(domain: Any, error: type[Exception], message: str) -> None:
    layer = DomainBatchNorm2d(3, num_domains=3)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 3, 2, 2), domain)
    assert layer.num_batches_tracked.tolist() == [0, 0, 0]


@pytest.mark.parametrize("domain", [torch.tensor([0, 1, 2, 0]), 1], ids=["per_sample", "int"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4, 3), ValueError, r"DomainBatchNorm2d expects x of shape \[N, C, H, W\], got \[4, 3\]"),
        (torch.randn(4, 5, 2, 2), ValueError, r"expects .* of shape \[C\] = \[5\] .*Give the layer num_features=5"),
        (torch.randn(4, 3, 2, 2).double(), TypeError, r"expects .* in torch.float64 .*, got torch.float32"),
        (torch.ones(4, 3, 2, 2).long(), TypeError, "expects x of a floating-point dtype"),
    ],
)
@pytest.mark.parametrize("affine_per_domain", [True, False])
def test_a_wrong_input_raises_an_error(
    x: Tensor, error: Any, message: str, domain: Any, affine_per_domain: bool
) -> None:
    with pytest.raises(error, match=message):
        DomainBatchNorm2d(3, num_domains=3, affine_per_domain=affine_per_domain)(x, domain)


def test_a_wrong_argument_raises_an_error() -> None:
    for number in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match=r"DomainBatchNorm2d expects num_domains to be an int >= 1, got .* Pass"):
            DomainBatchNorm2d(3, num_domains=number)
    with pytest.raises(ValueError, match=r"expects domain in \[0, 3\), got 3"):
        make().select(3)
    with pytest.raises(ValueError, match="DomainBatchNorm2d expects eps > 0"):
        DomainBatchNorm2d(3, num_domains=2, eps=0.0)
