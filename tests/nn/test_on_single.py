"""`on_single="running"`: a batch with one value per channel is normalized as in evaluation, and updates nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm import functional, nn
from batchnorm.nn.layer import NormLayer
from tests.nn.test_family_contract import FAMILY, MEMBERS, data, layer_of, step

pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]
SINGLE = (1, 4, 1, 1)
MASKED = pytest.mark.parametrize("name", [name for name, m in FAMILY.items() if m.mask or name == "BatchNormAct2d"])


def single_layer(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> NormLayer:
    """Return the layer with the option, and with running statistics that differ from their initial values."""
    layer = layer_of(name, dtype, on_single="running", **options)
    if name == "DecorrelatedBatchNorm2d":
        layer.running_whitening.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
    return layer


def in_evaluation(layer: NormLayer) -> NormLayer:
    return copy.deepcopy(layer).eval()


def run(name: str, layer: NormLayer, x: Tensor) -> list[Tensor]:
    return step(name, layer, layer, x)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"bias": False}], ids=str)
@MEMBERS
def test_one_value_is_normalized_as_in_evaluation_and_updates_nothing(name: str, options: dict[str, Any]) -> None:
    if name == "ConditionalBatchNorm2d" and "affine" in options:
        pytest.skip("only its classes have weight and bias")
    layer = single_layer(name, **options)
    x = data(shape=SINGLE)
    assert_equal(run(name, layer, x), run(name, in_evaluation(layer), x))
    if "affine" not in options:
        assert layer.weight.grad.any()
    plain = layer_of(name, **options)
    plain.load_state_dict(layer.state_dict())
    assert_equal(run(name, layer, data()), run(name, plain, data()))  # more values: as ever


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@MEMBERS
def test_every_dtype_is_normalized_as_in_evaluation(name: str, dtype: torch.dtype) -> None:
    layer, x = single_layer(name, torch.float32), data(dtype, SINGLE)
    assert_equal(run(name, layer, x), run(name, in_evaluation(layer), x))


@MEMBERS
def test_running_statistics_normalize_also_if_they_are_not_updated(name: str) -> None:
    layer, x = single_layer(name), data(shape=SINGLE)
    layer.update_running_stats = False
    assert_equal(run(name, layer, x), run(name, in_evaluation(layer), x))
    before = copy.deepcopy(dict(layer.state_dict()))
    run(name, layer, data())
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(4, on_single="running"), (1, 4)),
        (nn.BatchNorm1d(4, on_single="running"), (1, 4, 1)),
        (nn.BatchNorm3d(4, on_single="running"), (1, 4, 1, 1, 1)),
        (nn.BatchNorm(4, on_single="running"), (1, 4, 1, 1, 1, 1)),
        (nn.LazyBatchNorm1d(on_single="running"), (1, 4)),
        (nn.LazyBatchNorm2d(on_single="running"), SINGLE),
        (nn.BatchNormAct1d(4, on_single="running"), (1, 4)),
        (nn.BatchRenorm1d(4, rmax=1, dmax=0, on_single="running"), (1, 4)),
        (nn.GhostBatchNorm1d(4, on_single="running"), (1, 4)),
        (nn.DecorrelatedBatchNorm1d(4, on_single="running"), (1, 4)),
        (nn.FrozenBatchNormAct1d(4, on_single="running"), (1, 4)),
    ],
    ids=repr,
)
def test_every_rank_and_lazy_layers_take_one_value(layer: NormLayer, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(layer(x), in_evaluation(layer)(x))
    assert layer.num_batches_tracked == 0
    assert "on_single='running'" in repr(layer)


def test_the_default_is_an_error_that_names_the_option() -> None:
    for layer in (nn.BatchNorm1d(4), nn.BatchRenorm1d(4), nn.GhostBatchNorm1d(4), nn.SyncBatchNorm(4)):
        with pytest.raises(ValueError, match=r"use a larger batch, on_single='running' \(normalizes by the running"):
            layer(torch.randn(1, 4))
        assert "on_single" not in repr(layer)


@MEMBERS
def test_impossible_options_raise_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} expects on_single to be one of 'error', 'running', got 'skip'"):
        FAMILY[name].make(4, on_single="skip")
    if name not in ("BatchRenorm2d", "FrozenBatchNorm2d"):  # which need running statistics anyway
        with pytest.raises(ValueError, match=f"{name} expects track_running_stats=True with on_single='running'"):
            FAMILY[name].make(4, on_single="running", track_running_stats=False)


def test_the_function_normalizes_one_value_by_the_running_statistics() -> None:
    x, mean, var = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0])
    count = torch.tensor(5)
    for updates in (True, False):
        y = functional.batch_norm(
            x, mean, var, None, torch.ones(2), True, eps=1e-30, num_batches_tracked=count, residual=x,
            activation="relu", on_single="running", update_running_stats=updates,
        )  # fmt: skip
        assert_close(y, torch.tensor([[5.0, 7.0]]))
        assert (mean.tolist(), var.tolist(), count.item()) == ([1.0, 2.0], [4.0, 1.0], 5)
    with pytest.raises(
        ValueError, match="batch_norm expects running_mean and running_var with on_single='running', got"
    ):
        functional.batch_norm(x, None, None, training=True, on_single="running")
    with pytest.raises(ValueError, match="batch_norm expects on_single to be one of"):
        functional.batch_norm(x, mean, var, training=True, on_single="skip")


def test_the_function_updates_nothing_if_requested() -> None:
    x, mean, var, count = torch.randn(5, 2), torch.zeros(2), torch.ones(2), torch.tensor(0)
    y = functional.batch_norm(x, mean, var, None, None, True, num_batches_tracked=count, update_running_stats=False)
    assert torch.equal(y, functional.batch_norm(x, None, None, training=True))
    assert (mean.tolist(), var.tolist(), count.item()) == ([0.0, 0.0], [1.0, 1.0], 0)


# Masks: the number of positions that count is known only from their values


def one_position() -> Tensor:
    mask = torch.zeros(5, 6, 3, dtype=torch.bool)
    mask[2, 1, 1] = True
    return mask


@pytest.mark.parametrize("mask", [one_position(), one_position() * 0.3, one_position() & False], ids=["1", "w", "0"])
@MASKED
def test_a_mask_with_one_position_normalizes_as_in_evaluation(name: str, mask: Tensor) -> None:
    layer = single_layer(name)
    held = in_evaluation(layer)
    found = step(name, layer, lambda x, *extra: layer(x, *extra, mask=mask), data())
    expected = run(name, held, data())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(layer.buffers(), held.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@MASKED
def test_a_mask_with_one_position_agrees_by_every_route(name: str) -> None:
    layer, mask, extra = single_layer(name), one_position(), FAMILY[name].extra(5)
    layer.update_running_stats = False
    held, dy = in_evaluation(layer), data(seed=6)
    parameters = {key: p.detach() for key, p in layer.named_parameters()}

    def loss(module: NormLayer, parameters: dict[str, Tensor], x: Tensor, **kwargs: Any) -> Tensor:
        return (torch.func.functional_call(module, parameters, (x, *extra), kwargs) * dy).pow(2).sum()

    def penalty(module: NormLayer, x: Tensor, **kwargs: Any) -> Tensor:
        return torch.func.grad(loss, 2)(module, parameters, x, **kwargs).pow(2).sum()

    expected = torch.func.grad(penalty, 1)(held, data())
    assert_close(torch.func.grad(penalty, 1)(layer, data(), mask=mask), expected, rtol=1e-9, atol=1e-9)
    x = data().requires_grad_()
    (dx,) = torch.autograd.grad(loss(layer, dict(layer.named_parameters()), x, mask=mask), x, create_graph=True)
    (found,) = torch.autograd.grad(dx.pow(2).sum(), x)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)

    layer.update_running_stats = True
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for each in (mask, torch.ones_like(mask)):
        outcomes = [
            step(name, m, lambda x, *extra, call=call, each=each: call(x, *extra, mask=each), data())
            for m, call in ((layer, layer), (compiled, compiled))
        ]
        assert_close(outcomes[1], outcomes[0], rtol=1e-10, atol=1e-10)


# Layers whose batch has parts


def test_a_ghost_batch_with_one_position_is_normalized_by_the_running_statistics() -> None:
    layer = single_layer("GhostBatchNorm2d")  # parts of 2, 2 and 1 samples
    plain, held = layer_of("GhostBatchNorm2d"), in_evaluation(layer)
    x, mask = data(), torch.ones(5, 6, 3, dtype=torch.bool)
    mask[2:4] = False
    mask[3, 0, 0] = True
    y = layer(x, mask=mask)
    others = torch.tensor([0, 1, 4])
    assert_close(y[2:4], held(x)[2:4])
    assert_close(y[others], plain(x[others], mask=mask[others]))
    assert_close(layer.running_mean, plain.running_mean)
    assert_close(layer.running_var, plain.running_var)


def test_ghost_batches_of_one_value_are_normalized_by_the_running_statistics() -> None:
    layer = nn.GhostBatchNorm1d(4, ghost_size=1, on_single="running")
    x = torch.randn(3, 4)
    assert_close(layer(x), in_evaluation(layer)(x))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="use a larger ghost_size, or on_single='running'"):
        nn.GhostBatchNorm1d(4, ghost_size=1)(x)


@pytest.mark.parametrize("affine_per_domain", [True, False])
def test_a_domain_with_one_value_is_normalized_by_its_running_statistics(affine_per_domain: bool) -> None:
    options = {"num_domains": 3, "affine_per_domain": affine_per_domain, "dtype": torch.float64}
    layer = nn.DomainBatchNorm1d(4, on_single="running", **options)
    with torch.no_grad():
        for t in layer.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    parts = [layer.select(domain) for domain in range(3)]
    assert all(part.on_single == "running" for part in parts)
    domain = torch.tensor([0, 1, 0, 0, 0])
    x = torch.randn(5, 4, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours, domain)
    expected = torch.stack([*parts[0](theirs[domain == 0]), *parts[1](theirs[domain == 1])])[
        torch.tensor([0, 4, 1, 2, 3])
    ]
    assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_close(ours.grad, theirs.grad)
    assert layer.num_batches_tracked.tolist() == [1, 0, 0]
    for row, part in enumerate(parts):
        assert_close(layer.running_mean[row], part.running_mean)
        assert_close(layer.running_var[row], part.running_var)


# With torch's other features


@MEMBERS
def test_every_batch_size_compiles_and_takes_the_same_path(name: str) -> None:
    plain = single_layer(name)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for n in (5, 1, 3, 1):
        x = data(shape=(n, 4, 1, 1), seed=n)
        outcomes = [step(name, m, call, x) for m, call in ((plain, plain), (layer, compiled))]
        assert_close(outcomes[1], outcomes[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@MEMBERS
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    layer, x = single_layer(name), data(shape=SINGLE)

    def again(x: Tensor, *extra: Tensor) -> Tensor:
        return checkpoint(layer, x, *extra, use_reentrant=reentrant)

    assert_equal(step(name, layer, again, x), run(name, layer, x))


@MEMBERS
def test_copies_and_the_state_dict_do_not_change(name: str) -> None:
    layer, x = single_layer(name), data(shape=SINGLE)
    assert layer.state_dict().keys() == layer_of(name).state_dict().keys()
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(again) == repr(layer)
        assert_equal(run(name, again, x), run(name, layer, x))


def test_an_exported_training_graph_depends_on_its_batch_and_a_trace_is_refused() -> None:
    layer = nn.BatchNorm1d(4, on_single="running")
    x = torch.randn(1, 4)
    program = torch.export.export(layer, (x,), strict=False)
    assert torch.equal(program.module()(x), in_evaluation(layer)(x))
    with pytest.raises(ValueError, match="expects on_single='error' in a traced training graph, got 'running'"):
        torch.jit.trace(layer, torch.randn(3, 4))
    torch.jit.trace(layer.eval(), torch.randn(3, 4))


# With the functions that change a model


def test_convert_takes_and_carries_the_option() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    model, _ = batchnorm.convert(model, batchnorm.nn, on_single="running")
    assert model(torch.randn(1, 3)).shape == (1, 4)
    for to in ("BatchRenorm", "GhostBatchNorm", "SyncBatchNorm", "DecorrelatedBatchNorm"):
        again = batchnorm.convert(model, to).model
        assert again[1].on_single == "running"
        assert again(torch.randn(1, 3)).shape == (1, 4)
    frozen = batchnorm.freeze(model).model
    assert batchnorm.unfreeze(frozen).model[1].on_single == "running"
    there = batchnorm.convert(model, torch.nn).model
    assert batchnorm.convert(there, batchnorm.nn, on_single="running").model[1].on_single == "running"
    free = torch.nn.Sequential(torch.nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="keep them, or use on_single='error'"):
        batchnorm.convert(free, batchnorm.nn, on_single="running")


def test_accelerate_keeps_the_option() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), nn.BatchNorm1d(4, on_single="running"), torch.nn.ReLU())
    fast, report = batchnorm.accelerate(model, torch.randn(5, 3))
    assert report.fused
    x = torch.randn(1, 3)
    assert_close(fast(x), copy.deepcopy(model).eval()(x))
    assert fast[1].num_batches_tracked == 0
