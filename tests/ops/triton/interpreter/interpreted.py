"""Tests of the kernels beyond the contract; test_interpreted.py runs them in the interpreter."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import batchnorm
from batchnorm.ops import direct, eager, strict, triton
from batchnorm.ops.triton import frame, launch, tiling, variants
from benchmarks.gpu import layers
from benchmarks.gpu.timing import HostClock
from tests.cases import Case
from tests.ops import native_node
from tests.ops import test_contract as contract
from tests.ops.triton.interpreter.operators import operator
from tests.tolerance import bound

ATTRIBUTES = (1e-5, "relu", 0.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
def test_in_triton_results_keep_the_strides_of_x(layout: str) -> None:
    case = Case((2, 3, 4, 5), layout=layout)
    x, dy, residual = case.x(), case.random(1).contiguous(), case.random(2).double()
    y, mean, mean_low, var = operator("train_forward")(x, None, None, residual, *ATTRIBUTES)
    saved = (dy, x, None, y, mean, mean_low, var, None, None)
    dx, _, _, dz = operator("train_backward")(*saved, *ATTRIBUTES, True)
    held, _, _, held_dz = operator("normalize_backward")(*saved, None, 1, *ATTRIBUTES, True)
    for result in (y, dx, dz, held, held_dz):
        assert result.stride() == torch.empty_like(x).stride()
    expected = eager.train_backward(*saved, *ATTRIBUTES, True)
    torch.testing.assert_close((dx, dz), (expected[0], expected[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 3), (40, 8, 5, 5)], ids=["one launch", "several"])
def test_in_triton_channels_that_share_a_line_agree_with_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    case = Case(shape, dtype)
    x = frame.Frame.of(case.x())
    for t in (x.at_once(1), x.at_once(2)) if shape[0] == 4 else (x.streamed(),):
        assert t is not None
        assert t.group == shape[1]
    contract.test_train_forward_and_backward_agree_with_the_reference.at_one_point(operator, case, "relu", "residual")
    contract.test_normalize_and_its_backward_agree_with_the_reference.at_one_point(operator, case, "gelu", "alone")
    contract.test_weights_agree_with_the_reference.at_one_point(operator, case, "mask")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (4, 3, 16, 16)], ids=["one launch", "several"])
def test_in_triton_the_recomputed_mask_is_that_of_forward(shape: tuple[int, ...], layout: str) -> None:
    case = Case(shape, layout=layout)
    x, (weight, bias) = case.x(), case.parameters()
    y, *statistics = operator("train_forward")(x, weight, bias, None, *ATTRIBUTES)
    ones = torch.ones_like(x)
    for saved_y in (None, y):
        saved = (ones, x, None, saved_y, *statistics, weight, bias)
        *_, dz = operator("train_backward")(*saved, *ATTRIBUTES, True)
        assert torch.equal(dz > 0, y > 0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 7), (4, 3, 16, 16), (20, 4, 5, 5)], ids=["one launch", "several", "several channels a line"]
)
def test_in_triton_offsets_of_32_and_of_64_bits_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layout: str
) -> None:
    case = Case(shape, layout=layout)
    x, dy, vectors, index = case.x(), case.random(1), torch.rand(2, shape[1]), torch.arange(shape[0]) % 2
    weights = (case.random(2)[:, 0] > 0).float()

    def everything() -> list[torch.Tensor]:
        y, *statistics = operator("train_forward")(x, None, None, None, *ATTRIBUTES)
        kept = (dy, x, None, None)
        by_row = (*kept, vectors, None, vectors, None, None)
        return [
            y, *statistics,
            *operator("train_backward")(*kept, *statistics, None, None, *ATTRIBUTES, False)[:3],
            *operator("moments")(x, index, weights, 2),
            *operator("normalize_backward")(*by_row, index, 2, *ATTRIBUTES, True),
            *operator("backward_apply")(*by_row, vectors, vectors, index, weights, *ATTRIBUTES, False),
        ]  # fmt: skip

    narrow = everything()
    monkeypatch.setattr(tiling, "_WIDE", 0)
    frame.forget()
    for a, b in zip(narrow, everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 12), (24, 12, 1), (24, 1)], ids=str)
def test_in_triton_samples_of_one_value_are_merged_without_parts(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    moments = operator("moments")
    case = Case(shape, dtype)
    contract.test_index_gives_each_group_its_own_statistics.at_one_point(operator, case, "affine_by_group")
    x, index = case.x(), torch.arange(24) % 3
    weights = torch.rand(24, *shape[2:])
    weights[::5] = 0.0
    poisoned = torch.where(weights.reshape(24, 1, *shape[2:]) == 0, torch.nan, x)
    monkeypatch.setattr(frame.Frame, "vectors", _only_rows(frame.Frame.vectors))
    found = moments(poisoned, index, weights, 3)
    count, mean, mean_low, m2 = eager.moments(x.double(), index, weights.double(), 3)
    torch.testing.assert_close(found[0], count, rtol=0, atol=0)
    torch.testing.assert_close(found[1].double() + found[2].double(), mean + mean_low, rtol=5e-7, atol=5e-7)
    torch.testing.assert_close(found[3].double(), m2, rtol=5e-7, atol=0)


def _only_rows(make: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    def made(x: frame.Frame, number: int, *shape: int) -> list[torch.Tensor]:
        assert len(shape) == 2  # results of groups, and no parts
        return make(x, number, *shape)

    return made


def test_in_triton_an_outlier_does_not_cost_the_others_precision() -> None:
    x = torch.randn(4, 3, 16, 16) + 1e4
    x[0, :, 0, 0] = 0.0  # the first value, from which sums might start
    _, mean, mean_low, m2 = launch.moments(x, None, None, 1)
    wide = x.double().transpose(0, 1).flatten(1)
    center = wide.mean(1)
    spread = (wide - center[:, None]).abs().mean(1)
    assert (
        (mean.double() + mean_low.double() - center).abs() <= torch.from_numpy(bound(spread.numpy(), x.dtype))
    ).all()
    torch.testing.assert_close(m2.double(), (wide - center[:, None]).square().sum(1), rtol=5e-7, atol=0)


def test_in_triton_an_index_outside_its_rows_gives_nan_only_there() -> None:
    x, rows = torch.randn(3, 2, 5), torch.ones(2, 2)
    y = launch.normalize(x, rows, None, rows, None, None, None, torch.tensor([0, 2, -1]), *ATTRIBUTES)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("values", ["finite", "infinite"])
@pytest.mark.parametrize("count", [None, 0.0, 1.0, 7.5])
def test_in_triton_running_statistics_are_updated_as_in_eager(
    skip: bool, momentum: float | None, values: str, count: float | None
) -> None:
    mean, mean_low, var = torch.randn(3), torch.randn(3) * 1e-8, torch.rand(3)
    if values == "infinite":
        var[1] = torch.inf
    counted = None if count is None else torch.tensor(count, dtype=torch.float64)
    found = []
    for update in (operator("update_running_"), eager.update_running_):
        running = torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(4)
        before = running[0]._version
        update(*running, mean, mean_low, var, 12, counted, momentum, skip)
        assert running[0]._version > before
        found.append(running)
    torch.testing.assert_close(found[0], found[1], rtol=2e-7, atol=0)


def test_in_triton_running_statistics_need_a_counter_without_momentum() -> None:
    with pytest.raises(RuntimeError, match=r"update_running_ expects num_batches_tracked if momentum is None"):
        launch.update_running_(*torch.ones(2, 3), None, *torch.ones(3, 3), 12, None, None, False)


_FORMS = [
    ((3, 5, 7, 7), "contiguous"), ((4, 3, 16, 16), "contiguous"), ((8, 8, 3, 5), "contiguous"),
    ((3, 5, 7, 7), "channels_last"), ((40, 40, 8, 8), "channels_last"), ((6, 1, 1, 1), "contiguous"),
    ((1, 3), "contiguous"), ((4, 16, 3), "contiguous"), ((40, 8, 5, 5), "contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "layout", "tracked"), [(*form, i % 2 == 0) for i, form in enumerate(_FORMS)])
def test_in_triton_forward_also_updates_the_running_statistics(
    shape: tuple[int, ...], layout: str, tracked: bool
) -> None:
    x = Case(shape, layout=layout).x()
    m = x.numel() // shape[1]
    found = []
    for together in (True, False):
        running = torch.full(shape[1:2], 2.0), torch.full(shape[1:2], 3.0), torch.tensor(4) if tracked else None
        before = running[0]._version
        if together:
            function = triton.fused(operator("train_forward"), _not_called)
            results = function(x, None, None, None, *ATTRIBUTES, *running, 0.3)
        else:
            results = operator("train_forward")(x, None, None, None, *ATTRIBUTES)
            operator("update_running_")(*running, *results[1:], m, None, 0.3, False)
        assert running[0]._version > before
        assert running[2] is None or int(running[2]) == 5
        found.append((*results, *running[:2]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def _not_called(*arguments: object) -> None:
    raise AssertionError(arguments)


def _let_layers_use_the_kernels(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    """Let layers on the CPU take the route of a GPU, with the node in C++ ("native") or in Python."""
    native = strict._native
    if node == "python":
        monkeypatch.setattr(strict, "AVAILABLE", False)
        monkeypatch.setattr(direct, "is_direct", lambda *tensors: direct.unobserved(tensors))
    elif native is None:
        pytest.skip("no node in C++ in this build")
    else:
        monkeypatch.setattr(strict, "_native", native_node.launched(native))


@contextlib.contextmanager
def _kernels_called() -> Iterator[list[str]]:
    """Record the kernels that are started."""
    started, start = [], variants.Launch.start

    def record(self: variants.Launch, tensors: Any, floats: Any) -> None:
        started.append(self.kernel.function.fn.__name__)
        start(self, tensors, floats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants.Launch, "start", record)
        yield started


@pytest.mark.parametrize("node", ["native", "python"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (4, 3, 16, 16)], ids=["one launch", "several"])
def test_in_triton_a_step_with_activation_checkpointing_updates_the_running_statistics_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], reentrant: bool, node: str
) -> None:
    operator("train_forward")  # prepares the interpreter
    dy, expected = torch.randn(shape), batchnorm.BatchNormAct2d(shape[1], activation="relu")
    layer = copy.deepcopy(expected)
    found = []
    for module in (expected, layer):
        x = Case(shape).x().requires_grad_()
        if module is layer:
            _let_layers_use_the_kernels(monkeypatch, node)
            with _kernels_called() as started:
                y = checkpoint(layer, x, use_reentrant=reentrant)
                y.backward(dy)
            assert started
        else:
            y = module(x)
            y.backward(dy)
        found.append((y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


_LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"activation": "relu"}, "residual": {"activation": "silu", "residual": True},
    "cumulative": {"momentum": None}, "skip": {"on_nonfinite": "skip"}, "not affine": {"affine": False},
    "bfloat16": {"dtype": torch.bfloat16, "activation": "relu", "residual": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 5, 7, 7), "contiguous"), ((4, 3, 16, 16), "channels_last")],
    ids=["one launch", "several"],
)
@pytest.mark.parametrize("call", _LAYERS)
def test_in_triton_a_layer_with_the_native_node_agrees_with_the_cpu_in_training_and_evaluation(
    monkeypatch: pytest.MonkeyPatch, call: str, shape: tuple[int, ...], layout: str
) -> None:
    operator("train_forward")  # prepares the interpreter
    options = {"dtype": torch.float32, "residual": False, **_LAYERS[call]}
    dtype, has_residual = options.pop("dtype"), options.pop("residual")
    case = Case(shape, dtype, layout=layout)
    x, dy = case.x(), case.random(1)
    residual = case.random(2) if has_residual else None
    expected = batchnorm.BatchNormAct2d(shape[1], dtype=dtype, **options)
    layer = copy.deepcopy(expected)
    found: list[list[torch.Tensor]] = []
    for module in (expected, layer):
        if module is layer:
            _let_layers_use_the_kernels(monkeypatch, "native")
        with _kernels_called() as started:
            found.append([])
            for training in (True, False):
                inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
                y = module.train(training)(*inputs)
                wanted = [*inputs, *module.parameters()]
                found[-1] += [y.detach(), *torch.autograd.grad(y, wanted, dy)]
            found[-1] += [t.clone() for t in module.buffers()]
        assert bool(started) == (module is layer)
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if a.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.fixture
def _kernels_serve_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(strict, "AVAILABLE", False)  # these operators are only for the CPU
    library = torch.library.Library("batchnorm", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once a process, that this overrides the compiled operators
        for name in triton.OPERATORS:
            library.impl(name, operator(name), "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.usefixtures("_kernels_serve_the_cpu")
@pytest.mark.parametrize("residual", [False, True])
def test_in_triton_the_benchmark_checks_and_measures_the_kernels(
    monkeypatch: pytest.MonkeyPatch, residual: bool
) -> None:
    called = []
    for name in ("train_forward", "train_backward", "update_running_"):
        function = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, f=function, name=name: called.append(name) or f(*a))
    triton._launcher.cache_clear()
    case = layers.Case((4, 3, 6, 6), "channels-last", "bfloat16", residual)
    layers.check(case, torch.device("cpu"))
    assert sorted(called) == ["train_backward", "train_forward", "update_running_"]
    row = layers.measure(case, HostClock(), layers.OURS, 1e9, 1)
    assert row["ms"] > 0.0
    assert len(called) > 3
    triton._launcher.cache_clear()
