"""Conditional batch normalization: statistics of the batch, γ and β of each sample."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm import BatchNorm2d, functional, reference
from batchnorm.nn.conditional import (
    ConditionalBatchNorm,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
)
from tests.cases import CASES, Case, ids
from tests.nn.groups.by_rows import assert_agrees_with_the_reference, randomized, step_results, wide

# torch's compiler and its forward-mode rules script functions of their own at first use, and warn themselves of it.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

SHAPES = {
    ConditionalBatchNorm: (6, 3, 2, 3, 2, 2),
    ConditionalBatchNorm1d: (6, 3, 5),
    ConditionalBatchNorm2d: (6, 3, 5, 4),
    ConditionalBatchNorm3d: (6, 3, 2, 5, 4),
}
LABELS = torch.tensor([0, 3, 1, 1, 0, 3])  # no sample is of class 2
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def make(kind: type[ConditionalBatchNorm] = ConditionalBatchNorm2d, **options: Any) -> ConditionalBatchNorm:
    return randomized(kind(3, **{"num_classes": 4, "dtype": torch.float64, **options}))


def per_sample(n: int = 6) -> tuple[Tensor, Tensor]:
    weight, bias = torch.randn(2, n, 3, dtype=torch.float64).unbind()
    return weight.clone().requires_grad_(), bias.clone().requires_grad_()


def spread(rows: Tensor, x: Tensor) -> Tensor:
    return rows.reshape(*rows.shape, *(1,) * (x.dim() - 2))


def test_it_starts_as_plain_batch_normalization() -> None:
    layer, x = ConditionalBatchNorm2d(3, num_classes=4), torch.randn(6, 3, 5, 4)
    assert layer.weight.shape == layer.bias.shape == (4, 3)
    assert layer.running_mean.shape == (3,)
    plain = BatchNorm2d(3)
    assert_close(layer(x, LABELS), plain(x))
    assert_close(layer(x, 2), plain(x))
    assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"momentum": None, "eps": 1e-3}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("kind", SHAPES)
def test_is_normalization_then_the_affine_of_each_sample(
    kind: type[ConditionalBatchNorm], options: dict[str, Any]
) -> None:
    layer = make(kind, **options)
    plain = layer.select(0)
    plain.weight = plain.bias = None
    for step, label in enumerate((LABELS, 2, torch.tensor(1), LABELS, 3)):
        layer.train(step < 3), plain.train(step < 3)
        layer.zero_grad()
        x = torch.randn(SHAPES[kind], dtype=torch.float64) + 3
        dy = torch.randn_like(x)
        leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
        tables = [None if t is None else t.detach().clone().requires_grad_() for t in (layer.weight, layer.bias)]
        rows = torch.as_tensor(label).expand(6)
        expected = plain(again) * spread(tables[0][rows], x)
        if tables[1] is not None:
            expected = expected + spread(tables[1][rows], x)
        y = layer(leaf, label)
        y.backward(dy)
        expected.backward(dy)
        assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert_close(leaf.grad, again.grad, rtol=1e-11, atol=1e-11)
        for parameter, table in zip(layer.parameters(), tables, strict=False):
            assert_close(parameter.grad, table.grad, rtol=1e-11, atol=1e-11)
        assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()), rtol=1e-12, atol=1e-12)


@TRAINING
@pytest.mark.parametrize("given", ["both", "weight", "bias"])
def test_rows_given_in_the_call_are_those_of_a_table(given: str, training: bool) -> None:
    layer = make().train(training)
    weight, bias = per_sample()
    bare = ConditionalBatchNorm2d(3, dtype=torch.float64).train(training)
    assert not list(bare.parameters())
    bare.load_state_dict({key: t for key, t in layer.state_dict().items() if "running" in key or "num" in key})
    arguments = (
        {"weight": weight, "bias": bias} if given == "both" else {given: {"weight": weight, "bias": bias}[given]}
    )
    x = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = bare(x, **arguments)
    plain = functional.batch_norm(x, *(None, None) if training else (layer.running_mean, layer.running_var),
                                  training=training)  # fmt: skip
    expected = plain * (spread(weight, x) if "weight" in arguments else 1.0)
    expected = expected + (spread(bias, x) if "bias" in arguments else 0.0)
    assert_close(y, expected)
    assert_close(layer(x, **arguments), expected)  # a layer with classes takes them too
    inputs, dy = (x, *arguments.values()), torch.randn_like(x)
    assert_close(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), rtol=1e-10, atol=1e-10)


def test_rows_come_from_networks_in_half_precision() -> None:
    layer, gain = ConditionalBatchNorm2d(8), nn.Linear(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x, z = torch.randn(4, 8, 6, 6).bfloat16(), torch.randn(4, 5)
        y = layer(x, weight=1 + gain(z))
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert gain.weight.grad.isfinite().all()
    assert layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("case", [case for case in CASES if case.shape[0] > 3 and case.m > 8], ids=ids)
def test_agrees_with_the_reference(case: Case) -> None:
    index = torch.arange(case.shape[0]) % 3
    layer = ConditionalBatchNorm(case.shape[1], num_classes=3)
    layer.weight, layer.bias = (
        None if t is None else nn.Parameter(torch.stack([t, 2 * t, -t])) for t in case.parameters()
    )
    assert_agrees_with_the_reference(case, layer, layer.weight, layer.bias, index, lambda x: layer(x, index))


@TRAINING
@pytest.mark.parametrize("label", [LABELS, 1], ids=["per_sample", "int"])
def test_first_and_second_derivatives(label: Any, training: bool) -> None:
    layer = make().train(training)
    layer.update_running_stats = False
    x = torch.randn(6, 3, 2, 1, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x, label))

    inputs = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs)


@TRAINING
def test_derivatives_for_rows_given_in_the_call(training: bool) -> None:
    layer = make(num_classes=None).train(training)
    layer.update_running_stats = False
    inputs = (torch.randn(5, 3, 2, dtype=torch.float64).unsqueeze(-1).requires_grad_(), *per_sample(5))

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer(x, weight=weight, bias=bias)

    assert gradcheck(call, inputs, check_forward_ad=True)
    assert gradgradcheck(call, inputs)


def test_second_derivatives_agree_with_the_reference() -> None:
    layer, x = make(), torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x).requires_grad_()
    first = torch.autograd.grad(layer(x, LABELS), (x, layer.weight, layer.bias), dy, create_graph=True)
    upstream = [torch.randn_like(t) for t in first]
    found = torch.autograd.grad(first, (dy, x, layer.weight), upstream)
    forward = reference.forward_training(
        wide(x), wide(layer.weight), wide(layer.bias), index=LABELS.numpy(), eps=layer.eps
    )
    expected = reference.double_backward(*map(wide, upstream), wide(dy), forward)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, torch.from_numpy(theirs), rtol=1e-10, atol=1e-10)


def test_a_mask_leaves_positions_out() -> None:
    layer = make()
    plain = layer.select(0)
    plain.weight = plain.bias = None
    x, mask = torch.randn(6, 3, 4, 4, dtype=torch.float64), torch.rand(6, 4, 4) < 0.6
    y = layer(x, LABELS, mask=mask)
    assert_close(y, plain(x, mask=mask) * spread(layer.weight[LABELS], x) + spread(layer.bias[LABELS], x))
    assert_close(layer.running_var, plain.running_var)


@TRAINING
def test_an_empty_batch_updates_nothing(training: bool) -> None:
    layer = make().train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    none = torch.empty(0, 3, dtype=torch.float64, requires_grad=True)
    for y in (layer(x, torch.empty(0, dtype=torch.int64)), layer(x, 1), layer(x, weight=none, bias=none)):
        y.sum().backward()
    assert x.grad.shape == x.shape
    assert (layer.weight.grad == 0).all()
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_skip_leaves_running_statistics_after_an_overflow() -> None:
    layer, x = ConditionalBatchNorm2d(3, num_classes=2, on_nonfinite="skip"), torch.randn(4, 3, 2, 2)
    x[0, 0] = torch.inf
    layer(x, torch.tensor([0, 1, 0, 1]))
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


def test_plain_batch_normalization_loads_into_every_class_and_comes_back() -> None:
    plain = torch.nn.BatchNorm2d(3)
    plain(torch.randn(8, 3, 4, 4) + 2)
    layer = ConditionalBatchNorm2d(3, num_classes=4)
    layer.load_state_dict(plain.state_dict(), strict=True)
    for k in range(4):
        one = layer.select(k)
        assert type(one) is BatchNorm2d
        assert_close(one.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        layer.weight[1] = 3.0
    x = torch.randn(4, 3, 2, 2)
    assert_close(layer.select(1).eval()(x), layer.eval()(x, 1))


def test_copies_and_pickles_and_saves() -> None:
    layer, x = make(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    loaded = ConditionalBatchNorm2d(3, num_classes=4, dtype=torch.float64)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    others = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded)
    y = layer(x, LABELS)
    for other in others:
        assert torch.equal(other(x, LABELS), y)
        assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_is_a_batch_norm_and_describes_itself() -> None:
    layer = ConditionalBatchNorm2d(3, num_classes=2)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert not isinstance(layer, torch.nn.BatchNorm2d)
    assert repr(layer).endswith("track_running_stats=True, num_classes=2)")
    assert repr(ConditionalBatchNorm1d(3)).endswith("num_classes=None)")
    torch.nn.init.zeros_(layer.weight)
    layer.reset_parameters()
    assert (layer.weight == 1).all()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("label", [LABELS, 1], ids=["per_sample", "int"])
def test_checkpointing_updates_once(label: Any, reentrant: bool) -> None:
    plain = make()
    layer, x = copy.deepcopy(plain), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    found = step_results(layer, lambda m, x: checkpoint(m, x, label, use_reentrant=reentrant), x)
    assert_close(found, step_results(plain, lambda m, x: m(x, label), x))


@TRAINING
@pytest.mark.parametrize("how", ["per_sample", "int", "given"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_break(backend: str, how: str, training: bool) -> None:
    layer = make().train(training)
    again = copy.deepcopy(layer)
    compiled: Any = torch.compile(again, backend=backend, fullgraph=True)
    weight, bias = (t.detach() for t in per_sample())
    arguments = {"per_sample": {"label": LABELS}, "int": {"label": 1}, "given": {"weight": weight, "bias": bias}}[how]
    if how == "given":
        layer.requires_grad_(False), again.requires_grad_(False)
        layer._parameters, again._parameters = {}, {}
    for _ in range(2):
        x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
        found = step_results(again, lambda m, x: compiled(x, **arguments), x)
        expected = step_results(layer, lambda m, x: m(x, **arguments), x)
        assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_compiles_for_batches_of_any_size() -> None:
    layer = make()
    again = copy.deepcopy(layer)
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 8, 3):
        x, (weight, bias) = torch.randn(n, 3, 4, 4, dtype=torch.float64), per_sample(n)
        assert_close(compiled(x, weight=weight, bias=bias), layer(x, weight=weight, bias=bias))
        assert_close(compiled(x, torch.arange(n) % 4), layer(x, torch.arange(n) % 4))


def test_is_one_node_of_an_fx_graph() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make()

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return self.norm(x, label).relu()

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert sum(node.op == "call_function" for node in traced.graph.nodes) == 1
    x, again = torch.randn(6, 3, 2, 2, dtype=torch.float64), copy.deepcopy(model)
    assert_close(traced(x, LABELS), again(x, LABELS))
    assert_close(model.state_dict(), again.state_dict())


@pytest.mark.parametrize("label", [LABELS, 1], ids=["per_sample", "int"])
def test_an_exported_layer_needs_no_operator_of_ours(label: Any) -> None:
    layer, x = make().eval(), torch.randn(6, 3, 2, 2, dtype=torch.float64)
    program = torch.export.export(layer, (x, label))
    assert "batchnorm" not in str(program.graph)
    assert_close(program.module()(x, label), layer(x, label))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "ConditionalBatchNorm2d expects a label, or weight and bias of each sample, got neither"),
        ({"label": 1, "bias": torch.zeros(4, 3)}, ValueError, "weight and bias of each sample, got both"),
        ({"label": 4}, ValueError, r"ConditionalBatchNorm2d expects label in \[0, 4\), got 4. Count from 0"),
        ({"label": torch.tensor([0, 1, 4, 0])}, ValueError, r"expects label in \[0, 4\), got 4"),
        ({"label": "cat"}, TypeError, r"label to be an int or an int64 tensor \[N\], got 'cat' \(str\)"),
        ({"label": torch.zeros(4)}, TypeError, r"label of dtype torch.int64, got torch.float32. Use label.long\(\)"),
        ({"label": torch.zeros(3).long()}, ValueError, r"label of shape \[N\] = \[4\] .* got \[3\]. Pass one label"),
        ({"weight": torch.ones(3)}, ValueError, r"weight of shape \[N, C\] = \[4, 3\] .*got \[3\]. Pass one row"),
        ({"bias": torch.ones(4, 5)}, ValueError, r"bias of shape \[N, C\] = \[4, 3\] .*got \[4, 5\]"),
        ({"bias": torch.ones(4, 3).double()}, TypeError, r"expects bias in torch.float32 for x .* got torch.float64"),
    ],
)  # fmt: skip
def test_a_wrong_call_raises_an_error_and_changes_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    layer = ConditionalBatchNorm2d(3, num_classes=4)
    with pytest.raises(error, match=message):
        layer(torch.randn(4, 3, 2, 2), **arguments)
    assert layer.num_batches_tracked == 0


def test_a_wrong_input_or_argument_raises_an_error() -> None:
    layer = ConditionalBatchNorm2d(3, num_classes=4)
    for label in (1, torch.tensor([0, 1, 2, 0])):
        with pytest.raises(ValueError, match=r"ConditionalBatchNorm2d expects x of shape \[N, C, H, W\], got \[4, 3\]"):
            layer(torch.randn(4, 3), label)
        with pytest.raises(ValueError, match=r"of shape \[C\] = \[5\] .*Give the layer num_features=5"):
            layer(torch.randn(4, 5, 2, 2), label)
    for label in (1, torch.tensor([1])):
        with pytest.raises(ValueError, match="expects more than one value per channel"):
            layer(torch.randn(1, 3, 1, 1), label)
    for number in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"expects num_classes to be an int >= 1 or None, got .* Pass the number"):
            ConditionalBatchNorm2d(3, num_classes=number)
    with pytest.raises(ValueError, match="expects affine=True with num_classes, got affine=False and num_classes=4"):
        ConditionalBatchNorm2d(3, affine=False, num_classes=4)
    with pytest.raises(ValueError, match=r"expects label in \[0, 4\), got -1"):
        layer.select(-1)
    bare = ConditionalBatchNorm2d(3)
    with pytest.raises(ValueError, match="expects num_classes to select a class, got None"):
        bare.select(0)
    with pytest.raises(ValueError, match="because it has none of its own, got a label. Create it with num_classes="):
        bare(torch.randn(4, 3, 2, 2), 1)
