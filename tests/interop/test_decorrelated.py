"""DecorrelatedBatchNorm with PyTorch's other features, its checkpoints, and its errors."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm.nn.decorrelated import (
    DecorrelatedBatchNorm,
    DecorrelatedBatchNorm1d,
    DecorrelatedBatchNorm2d,
    DecorrelatedBatchNorm3d,
    decorrelated_batch_norm,
)
from tests.nn.correlated import correlated, trained

LAYERS: dict[type, tuple[int, ...]] = {
    DecorrelatedBatchNorm: (3, 5, 2, 3, 2, 2),
    DecorrelatedBatchNorm1d: (12, 5, 3),
    DecorrelatedBatchNorm2d: (4, 5, 4, 3),
    DecorrelatedBatchNorm3d: (4, 5, 2, 3, 3),
}
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])


# Checkpoints and other tools


def test_a_checkpoint_of_batch_normalization_evaluates_as_it_did() -> None:
    theirs = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.BatchNorm2d(10)).double()
    for _ in range(3):
        theirs(torch.randn(4, 3, 6, 6, dtype=torch.float64))
    ours = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), DecorrelatedBatchNorm2d(10, group_size=4)).double()
    state = theirs.state_dict()
    keys = list(state)
    ours.load_state_dict(state)
    assert list(state) == keys
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours[1].num_batches_tracked == 3
    with pytest.raises(RuntimeError, match=r"running_mean: .*\[10\].*\[7\]"):
        DecorrelatedBatchNorm2d(7).load_state_dict(theirs[1].state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_state_dicts_carry_everything(clone: Callable[[Any], Any]) -> None:
    layer = trained(DecorrelatedBatchNorm1d(7, group_size=3, iterations=4), 9, 7)
    fresh = DecorrelatedBatchNorm1d(7, group_size=3, iterations=4)
    fresh.load_state_dict(layer.state_dict())
    x = correlated(9, 7, dtype=torch.float32)
    for other in (clone(layer), fresh):
        assert repr(other) == repr(layer)
        for training in (False, True):
            assert torch.equal(other.train(training)(x), copy.deepcopy(layer).train(training)(x))
    assert set(layer.state_dict()) == {
        "weight", "bias", "running_mean", "running_whitening", "num_batches_tracked",
    }  # fmt: skip


def test_tools_that_would_lose_the_whitening_fail() -> None:
    layer = DecorrelatedBatchNorm2d(5).eval()
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    assert not hasattr(layer, "running_var")
    with pytest.raises(AttributeError, match="running_var"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.Sequential(layer))
    with pytest.raises(AttributeError, match="running_var"):
        torch.nn.utils.fuse_conv_bn_eval(torch.nn.Conv2d(3, 5, 3).eval(), layer)


def test_averaged_weights_renew_the_statistics() -> None:
    layer = DecorrelatedBatchNorm1d(5)
    batches = [correlated(20, 5, dtype=torch.float32, seed=seed) for seed in (1, 2)]
    torch.optim.swa_utils.update_bn(batches, layer)
    assert_close(layer.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    assert layer.momentum == 0.1


def test_description_names_groups_and_iterations() -> None:
    assert repr(DecorrelatedBatchNorm2d(80, group_size=32)) == (
        "DecorrelatedBatchNorm2d(80, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, "
        "group_size=32, iterations=5)"
    )


# Derivatives


@TRAINING
@pytest.mark.parametrize(("affine", "masked"), [(True, False), (False, True)], ids=["affine", "masked"])
def test_first_and_second_derivatives(affine: bool, masked: bool, training: bool) -> None:
    x = correlated(3, 5, 4).requires_grad_()
    layer = trained(DecorrelatedBatchNorm1d(5, affine=affine, group_size=3, iterations=3, dtype=torch.float64), 9, 5)
    mean, packed = layer.running_mean, layer.running_whitening
    parameters = tuple(p.detach().requires_grad_() for p in layer.parameters())

    mask = torch.rand(3, 4, dtype=torch.float64) if masked else None

    def call(x: Tensor, *affine: Tensor) -> Tensor:
        running = (None, None) if training else (mean, packed)
        return decorrelated_batch_norm(
            x, *running, *(affine or (None, None)), training, eps=1e-2, group_size=3, iterations=3, mask=mask
        )  # fmt: skip

    assert gradcheck(call, (x, *parameters), check_forward_ad=True)
    assert gradgradcheck(call, (x, *parameters))


@TRAINING
def test_transforms_of_torch_func(training: bool) -> None:
    layer = trained(DecorrelatedBatchNorm1d(5, group_size=3, dtype=torch.float64), 9, 5).train(training)
    layer.update_running_stats = False
    x, tangent = correlated(2, 8, 5), correlated(8, 5, seed=4)

    def loss(x: Tensor) -> Tensor:
        return layer(x).pow(3).sum()

    expected = []
    for sample in x:
        leaf = sample.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf), leaf)[0])
    assert_close(torch.vmap(torch.func.grad(loss))(x), torch.stack(expected))
    _, along = torch.func.jvp(loss, (x[0],), (tangent,))
    assert_close(along, (expected[0] * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x[0], tangent))).tangent
    assert_close(dual, along)
    hessian = torch.func.hessian(loss)(x[0])
    leaf = x[0].clone().requires_grad_()
    assert_close(hessian, torch.autograd.functional.hessian(loss, leaf))


def test_captured_buffers_under_torch_func_raise_an_error_and_do_not_change() -> None:
    layer, x = DecorrelatedBatchNorm1d(5), torch.randn(8, 5)
    with pytest.raises(RuntimeError, match=r"running statistics can be updated only .* update_running_stats=False"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    assert layer.num_batches_tracked == 0
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def loss(parameters: Any, buffers: Any) -> tuple[Tensor, Any]:
        buffers = {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(layer, (parameters, buffers), (x,)).pow(3).sum(), buffers

    _, moved = torch.func.grad(loss, has_aux=True)(parameters, buffers)
    layer(x)
    assert_close(moved, dict(layer.named_buffers()))


# Checkpointing and the compiler


@REENTRANT
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.usefixtures("nothing_compiled_before")
def test_checkpointing_updates_the_statistics_once(backend: str | None, reentrant: bool) -> None:
    plain = DecorrelatedBatchNorm2d(5, momentum=None, dtype=torch.float64)
    layer = copy.deepcopy(plain)
    call = layer if backend is None else torch.compile(layer, backend=backend, fullgraph=True)
    for number in (1, 2):
        x = correlated(4, 5, 3, 3, seed=number)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        plain(leaves[0]).pow(3).sum().backward()
        checkpoint(call, leaves[1], use_reentrant=reentrant).pow(3).sum().backward()
        assert_close(leaves[1].grad, leaves[0].grad)
        assert_close(layer.state_dict(), plain.state_dict())
        assert layer.num_batches_tracked == number


@pytest.mark.parametrize(
    ("backend", "training"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)], ids=str
)
@pytest.mark.usefixtures("nothing_compiled_before")
def test_compiles_without_a_break_with_one_graph_for_every_batch_size(backend: str, training: bool) -> None:
    iterations = 1 if backend == "inductor" else 5  # it compiles the same kernels for each iteration
    layer = DecorrelatedBatchNorm2d(5, group_size=3, iterations=iterations, on_nonfinite="skip", dtype=torch.float64)
    eager = trained(layer, 4, 5, 3, 3)
    again = copy.deepcopy(eager.train(training))
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(again, backend=counter, fullgraph=True)
    for size in (4, 7, 2):
        leaves = [correlated(size, 5, 3, 3).requires_grad_() for _ in range(2)]
        torch._dynamo.mark_dynamic(leaves[0], 0)
        results = []
        for leaf, call in zip(leaves, (compiled, eager), strict=True):
            y = call(leaf)
            if size == 2 and not training:  # written to before backward
                (again if call is compiled else eager).running_whitening.zero_()
            y.pow(3).sum().backward()
            results.append(y)
        assert_close(*results)
        assert_close(leaves[0].grad, leaves[1].grad)
        assert_close(again.weight.grad, eager.weight.grad)
        assert_close(again.state_dict(), eager.state_dict())
    assert counter.frame_count == 1
    assert again.num_batches_tracked == (5 if training else 2)


def test_buffers_may_be_written_to_before_backward() -> None:
    layer = trained(DecorrelatedBatchNorm1d(5), 9, 5)
    for training in (True, False):
        untouched = copy.deepcopy(layer.train(training))
        x = torch.randn(9, 5)
        y, expected = layer(x), untouched(x)
        layer(x + 1)
        with torch.no_grad():
            layer.running_whitening.fill_(7.0)
        layer.zero_grad()
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(layer.weight.grad, untouched.weight.grad)


def test_the_operator_keeps_its_contract() -> None:
    arguments = (torch.zeros(3), torch.eye(3), torch.tensor(1), torch.randn(3), torch.randn(3, 3), None, None, True)
    torch.library.opcheck(torch.ops.batchnorm.update_whitening_.default, arguments)


# The rest of PyTorch


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
def test_a_trace_of_many_values_takes_few() -> None:  # long sums have blocks, which a trace must not contain
    layer, x = DecorrelatedBatchNorm2d(4, group_size=2), torch.randn(6, 4, 4, 2)
    traced = torch.jit.trace(layer, torch.randn(2, 4, 50, 60), check_trace=False)
    assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)


def test_traces_and_exports() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), DecorrelatedBatchNorm2d(5, group_size=2))
    x = torch.randn(4, 3, 6, 6)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert decorrelated_batch_norm in {node.target for node in traced.graph.nodes}
    for training, strict in itertools.product((True, False), (True, False)):
        model.train(training)
        ours, its = copy.deepcopy(model), copy.deepcopy(model)
        program = torch.export.export(its, (x,), strict=strict)
        assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
        module = program.module()
        assert_close(module(x), ours(x))
        state = dict(module.state_dict())  # without what the program does not use
        assert ours.state_dict().keys() - state.keys() <= ({"1.num_batches_tracked"} if not training else set())
        assert_close(state, {k: v for k, v in ours.state_dict().items() if k in state})
    assert_close(traced(x), copy.deepcopy(model).train()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@TRAINING
def test_autocast_changes_nothing(dtype: torch.dtype, training: bool) -> None:
    layer = trained(DecorrelatedBatchNorm2d(5), 4, 5, 3, 3).train(training)
    x = correlated(4, 5, 3, 3, dtype=torch.float32)
    again = copy.deepcopy(layer)
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(x), again(x.clone()))
        y = layer(x.to(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, again(x.to(dtype)))
    half = copy.deepcopy(layer).to(dtype)
    assert half(x.to(dtype)).dtype == dtype
    assert half.running_whitening.dtype == dtype


def test_meta_and_inference_mode() -> None:
    layer = DecorrelatedBatchNorm2d(5, device="meta")
    assert layer(torch.empty(4, 5, 3, 3, device="meta")).shape == (4, 5, 3, 3)
    layer, x = DecorrelatedBatchNorm2d(5), torch.randn(4, 5, 3, 3)
    with torch.inference_mode():
        y = layer(x)
        layer.eval()(x)
    assert torch.equal(y, layer.train()(x))
    assert layer.num_batches_tracked == 2


# Errors


@pytest.mark.parametrize("layer", LAYERS)
def test_every_rank_whitens_its_shape_and_refuses_others(layer: type) -> None:
    shape = LAYERS[layer]
    x = correlated(*shape, dtype=torch.float32)
    y = layer(5, iterations=12)(x).detach().movedim(1, 0).flatten(1)
    assert_close(torch.cov(y, correction=0), torch.eye(5), rtol=0, atol=2e-3)
    name = layer.__name__
    if name[-1] == "d":
        with pytest.raises(ValueError, match=rf"{name} expects x of shape .* got \[2, 5, 1, 1, 1, 1\] \(6 dims\)"):
            layer(5)(torch.randn(2, 5, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"group_size": 0},
            ValueError,
            "expects group_size >= 1, got 0. It is the number of channels .* 64 is common.",
        ),
        (
            {"iterations": 0},
            ValueError,
            "expects iterations >= 1, got 0. It is the number of Newton steps; 5 is common",
        ),
        ({"group_size": 2.0}, TypeError, r"expects group_size to be an int, got 2.0 \(float\)"),
        ({"iterations": True}, TypeError, r"expects iterations to be an int, got True \(bool\)"),
        ({"eps": 0.0}, ValueError, "expects eps > 0, got 0.0"),
        ({"momentum": 2.0}, ValueError, r"expects momentum in \[0, 1\] or None, got 2.0"),
        ({"on_nonfinite": "x"}, ValueError, "expects on_nonfinite to be one of"),
    ],
)
def test_a_wrong_argument_raises_an_error(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"DecorrelatedBatchNorm2d {message}"):
        DecorrelatedBatchNorm2d(5, **options)


def test_a_wrong_call_raises_an_error_and_changes_nothing() -> None:
    layer = DecorrelatedBatchNorm2d(5)
    for shape, message in (
        ((1, 5, 1, 1), "expects more than one value per channel in training"),
        ((4, 3, 2, 2), r"expects weight of shape \[C\] = \[3\]"),
        ((4, 5), r"For \[N, C\] use DecorrelatedBatchNorm1d."),
    ):
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(shape))
    layer.group_size = 2
    with pytest.raises(ValueError, match=r"running_whitening of shape .* = \[5, 2\], got \[5, 5\]. Use the group_size"):
        layer(torch.randn(4, 5, 3, 3))
    assert layer.num_batches_tracked == 0
    x = torch.randn(4, 5)
    with pytest.raises(ValueError, match="both or neither, got running_mean without running_whitening. Pass the miss"):
        decorrelated_batch_norm(x, torch.zeros(5), None, training=True)
    with pytest.raises(ValueError, match=r"running_whitening in evaluation, got None. Pass them, or training=True"):
        decorrelated_batch_norm(x, None, None)
    with pytest.raises(ValueError, match="num_batches_tracked if momentum is None"):
        decorrelated_batch_norm(x, torch.zeros(5), torch.eye(5), training=True, momentum=None)
