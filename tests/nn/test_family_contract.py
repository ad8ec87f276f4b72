"""The properties that every layer of the family must have. A new layer is one line of `FAMILY`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from batchnorm import nn
from batchnorm.nn.conditional import ConditionalBatchNorm2d
from batchnorm.nn.decorrelated import DecorrelatedBatchNorm2d
from batchnorm.nn.domain import DomainBatchNorm2d
from batchnorm.nn.frozen import FrozenBatchNorm2d
from batchnorm.nn.ghost import GhostBatchNorm2d
from batchnorm.nn.layer import NormLayer
from batchnorm.nn.renorm import BatchRenorm2d
from batchnorm.nn.sync import SyncBatchNorm


@dataclass(frozen=True)
class Member:
    """The constructor of a layer of 4 channels, its further arguments for a number of samples, and its properties."""

    make: Callable[..., NormLayer]
    extra: Callable[[int], tuple[Any, ...]] = lambda samples: ()
    as_batch_norm: bool = True  # the state_dict and the evaluation are those of BatchNorm
    moves: bool = True  # training moves running statistics
    units: float = 16.0  # tolerance in units of float32, relative to the largest value
    mask: bool = True  # whether its call takes a mask


FAMILY = {
    "BatchNorm2d": Member(nn.BatchNorm2d),
    "BatchNormAct2d": Member(partial(nn.BatchNormAct2d, activation="silu"), as_batch_norm=False, mask=False),
    "BatchRenorm2d": Member(BatchRenorm2d),
    "GhostBatchNorm2d": Member(partial(GhostBatchNorm2d, ghost_size=2)),
    "SyncBatchNorm": Member(SyncBatchNorm),
    "FrozenBatchNorm2d": Member(partial(FrozenBatchNorm2d, trainable_affine=True), moves=False),
    "DomainBatchNorm2d": Member(
        partial(DomainBatchNorm2d, num_domains=2), lambda samples: (torch.arange(samples) % 2,), False
    ),
    "ConditionalBatchNorm2d": Member(
        partial(ConditionalBatchNorm2d, num_classes=3), lambda samples: (torch.arange(samples) % 3,), False
    ),
    "DecorrelatedBatchNorm2d": Member(DecorrelatedBatchNorm2d, as_batch_norm=False, units=100.0),
}
MEMBERS = pytest.mark.parametrize("name", FAMILY)
SHAPE = (5, 4, 6, 3)

# torch loads its forward-mode formulas by its own deprecated compiler.
pytestmark = [
    pytest.mark.usefixtures("nothing_compiled_before"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def layer_of(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> NormLayer:
    """Return the layer with parameters and running statistics that differ from their initial values."""
    layer = FAMILY[name].make(4, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in layer.state_dict().items():
            if key in ("weight", "bias", "running_mean", "running_var"):
                tensor.copy_(torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator))
    return layer


def data(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE, seed: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5).to(dtype)


def step(name: str, layer: NormLayer, call: Callable[..., Tensor], x: Tensor, dy: Tensor | None = None) -> list[Tensor]:
    """Return y, every gradient, and the state afterwards."""
    layer.zero_grad()
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(leaf, *FAMILY[name].extra(len(x)))
    y.backward(data(x.dtype, tuple(x.shape), seed=6) if dy is None else dy)
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters()), *(b.clone() for b in layer.buffers())]


@MEMBERS
def test_it_is_recognized_as_batch_normalization(name: str) -> None:
    layer = layer_of(name)
    assert isinstance(layer, NormLayer)
    assert isinstance(layer, torch.nn.modules.batchnorm._NormBase)
    assert isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) == (name != "BatchNormAct2d")
    assert repr(layer).startswith(f"{name}(4, eps=1e-05, momentum=0.1")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@MEMBERS
def test_every_dtype_and_layout_agrees_with_float64(name: str, dtype: torch.dtype, layout: str, training: bool) -> None:
    exact, layer = layer_of(name).train(training), layer_of(name, torch.float32).train(training)
    x = data(dtype)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    dy = data(dtype, seed=6)
    got, expected = step(name, layer, layer, x, dy), step(name, exact, exact, x.double(), dy.double())
    assert got[0].dtype == got[1].dtype == dtype
    assert got[0].stride() == torch.empty_like(x).stride()
    for ours, theirs in zip(got, expected, strict=True):
        if ours.dtype == torch.int64:
            assert torch.equal(ours, theirs)
            continue
        # One rounding in half; float32 sums of 90 terms, and their errors after whitening.
        units = 1.0 if ours.dtype != torch.float32 else FAMILY[name].units
        allowed = units * torch.finfo(ours.dtype).eps * theirs.abs().max().clamp_min(1.0)
        assert (ours.double() - theirs).abs().max() <= allowed


@MEMBERS
def test_second_derivatives_agree_by_both_routes(name: str) -> None:
    layer = layer_of(name)
    layer.update_running_stats = False
    x, extra, dy = data().requires_grad_(), FAMILY[name].extra(SHAPE[0]), data(seed=6)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x, *extra)) * dy).pow(2).sum()

    def penalty(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.grad(loss, 1)(parameters, x).pow(2).sum()

    held = {key: p.detach() for key, p in parameters.items()}
    composed = torch.func.grad(penalty, (0, 1))(held, x.detach())
    (dx,) = torch.autograd.grad(loss(parameters, x), x, create_graph=True)
    found = torch.autograd.grad(dx.pow(2).sum(), (*parameters.values(), x), allow_unused=True)
    for ours, theirs in zip(found, (*composed[0].values(), composed[1]), strict=True):
        assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs, rtol=1e-9, atol=1e-9)


@MEMBERS
def test_gradients_pass_gradcheck_in_evaluation(name: str) -> None:
    layer = layer_of(name).eval()
    extra = FAMILY[name].extra(3)
    x = data(shape=(3, 4, 2, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x, *extra), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, *extra), x)


@MEMBERS
def test_compiles_without_a_break(name: str) -> None:
    plain = layer_of(name)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for seed in (1, 2):
        outcomes = [step(name, m, call, data(seed=seed)) for m, call in ((plain, plain), (layer, compiled))]
        assert_close(outcomes[1], outcomes[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@MEMBERS
def test_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    plain = layer_of(name)
    layer = copy.deepcopy(plain)
    for seed in (1, 2):
        again = partial(checkpoint, layer, use_reentrant=reentrant)
        outcomes = [step(name, m, call, data(seed=seed)) for m, call in ((plain, plain), (layer, again))]
        assert_close(outcomes[1], outcomes[0], rtol=1e-11, atol=1e-11)


@MEMBERS
def test_statistics_are_updated_only_in_training_and_updates_can_be_turned_off(name: str) -> None:
    layer, extra = layer_of(name), FAMILY[name].extra(SHAPE[0])
    for training, held in ((True, True), (False, False), (True, False)):
        before = copy.deepcopy(dict(layer.state_dict()))
        layer.train(training)
        with nn.update_running_stats(layer, not held):
            layer(data(), *extra)
        moved = {key for key, value in layer.state_dict().items() if not torch.equal(value, before[key])}
        assert bool(moved) == (training and not held and FAMILY[name].moves)
        assert all(key.startswith(("running_", "num_batches_tracked")) for key in moved)


@MEMBERS
def test_an_empty_batch_gives_an_empty_result_and_updates_nothing(name: str) -> None:
    layer = layer_of(name)
    before = copy.deepcopy(dict(layer.state_dict()))
    x = data(shape=(0, 4, 6, 3)).requires_grad_()
    y = layer(x, *FAMILY[name].extra(0))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not any(p.grad is not None and p.grad.any() for p in layer.parameters())
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


@MEMBERS
def test_a_wrong_input_raises_an_error_and_changes_nothing(name: str) -> None:
    layer = layer_of(name)
    before, extra = copy.deepcopy(dict(layer.state_dict())), FAMILY[name].extra(SHAPE[0])
    with pytest.raises(ValueError, match=rf"{name} expects .* of shape .* for x of shape \[5, 7, 6, 3\]"):
        layer(data(shape=(5, 7, 6, 3)), *extra)
    with pytest.raises(TypeError, match=rf"{name} expects x of a floating-point dtype, got torch.int64"):
        layer(torch.zeros(SHAPE, dtype=torch.int64), *extra)
    with pytest.raises(TypeError, match=rf"{name} expects x to be a torch.Tensor, got list"):
        layer([1.0], *extra)
    if name != "SyncBatchNorm":  # accepts any rank, like torch's
        with pytest.raises(ValueError, match=rf"{name} expects x of shape \[N, C, H, W\], got \[5, 4\] \(2 dims\)"):
            layer(data(shape=(5, 4)), *extra)
    for options in ({"eps": 0.0}, {"momentum": 2.0}, {"on_nonfinite": "raise"}):
        with pytest.raises(ValueError, match=rf"{name} expects {next(iter(options))}"):
            FAMILY[name].make(4, **options)
    assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


SET_LATER = [
    ("momentum", math.nan, r"expects momentum in \[0, 1\] or None, got nan. It is the weight of the new batch"),
    ("momentum", -0.1, r"expects momentum in \[0, 1\] or None, got -0.1. "),
    ("momentum", "0.1", r"expects momentum to be a number, got '0.1' \(str\). It is the weight of the new batch"),
    ("eps", math.nan, "expects eps > 0, got nan. It keeps"),
    ("eps", -1e-5, "expects eps > 0, got -1e-05. It keeps"),
    ("eps", None, r"expects eps to be a number, got None \(NoneType\). The usual value is 1e-5."),
    ("on_nonfinite", "raise", "expects on_nonfinite to be one of 'propagate', 'skip', 'error', got 'raise'. Choose"),
    ("on_single", None, "expects on_single to be one of 'error', 'running', got None. Choose one"),
    ("channel_dim", 2, "expects channel_dim to be 1 or -1, got 2. Use 1"),
]
SET_LATER_IN_ONE = [
    ("BatchNormAct2d", "activation", "swish", "expects activation to be one of .* got 'swish'. Choose one"),
    ("BatchNormAct2d", "alpha", math.inf, "expects alpha to be a finite number, got inf. The usual value is 1."),
    ("BatchRenorm2d", "rmax", 0.5, "expects rmax >= 1, got 0.5. "),
    ("BatchRenorm2d", "dmax", lambda batches: -1.0, "expects dmax >= 0, got -1.0. "),
    ("GhostBatchNorm2d", "ghost_size", 0, "expects ghost_size >= 1, got 0. Pass the number of samples"),
]


@MEMBERS
def test_an_attribute_out_of_range_is_an_error_when_it_is_set(name: str) -> None:
    layer = layer_of(name)
    for attribute, value, message in (*SET_LATER, *(row[1:] for row in SET_LATER_IN_ONE if row[0] == name)):
        before = getattr(layer, attribute)
        with pytest.raises((TypeError, ValueError), match=f"{name} {message}"):
            setattr(layer, attribute, value)
        assert getattr(layer, attribute) == before
    layer.momentum, layer.eps = 1, 0.0  # allowed in evaluation
    assert torch.isfinite(layer.eval()(data(), *FAMILY[name].extra(SHAPE[0]))).all()
    if FAMILY[name].moves:
        with pytest.raises(ValueError, match=f"{name} expects eps > 0, got 0.0"):
            layer.train()(data(), *FAMILY[name].extra(SHAPE[0]))


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}, {"momentum": None}], ids=str)
@MEMBERS
def test_torchs_options_work(name: str, options: dict[str, Any]) -> None:
    if name == "ConditionalBatchNorm2d" and "affine" in options:
        pytest.skip("only its classes have weight and bias")
    layer = layer_of(name, **options)
    assert (layer.weight is None) == ("affine" in options)
    assert (layer.bias is None) == ("affine" in options or "bias" in options)
    assert all(t.isfinite().all() for t in step(name, layer, layer, data()))


@MEMBERS
def test_no_gradient_is_computed_if_it_is_not_needed(name: str) -> None:
    layer, extra = layer_of(name), FAMILY[name].extra(SHAPE[0])
    other = copy.deepcopy(layer)
    with torch.no_grad():
        silent = layer(data(), *extra)
    recorded = other(data(), *extra)
    assert not silent.requires_grad and recorded.requires_grad
    assert_close(silent, recorded.detach(), rtol=1e-13, atol=1e-13)
    assert_close(dict(layer.state_dict()), dict(other.state_dict()), rtol=1e-13, atol=1e-13)


@MEMBERS
def test_fx_traces_it(name: str) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer_of(name)
            self.label = next(iter(FAMILY[name].extra(SHAPE[0])), None)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(x) if self.label is None else self.norm(x, self.label)).relu()

    model = Network()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert torch.equal(traced(data()), model(data()))
    state = model.state_dict()
    for key, value in traced.state_dict().items():  # the trace contains only state that its graph uses
        assert key == "label" or torch.equal(state[key], value)


@pytest.mark.parametrize("name", [name for name, member in FAMILY.items() if member.mask])
def test_padding_does_not_count(name: str) -> None:
    mask = torch.rand(SHAPE[0], *SHAPE[2:]) < 0.7
    layer = layer_of(name)
    other = copy.deepcopy(layer)
    x = data()
    noise = torch.where(mask.unsqueeze(1), x, torch.nan)
    extra = FAMILY[name].extra(SHAPE[0])
    y, z = layer(x, *extra, mask=mask), other(noise, *extra, mask=mask)
    assert_close(y.movedim(1, -1)[mask], z.movedim(1, -1)[mask], rtol=0, atol=0)
    assert_close(dict(layer.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


INTEGERS = {
    "numpy": np.int64, "unsigned": np.uint8, "array": lambda n: np.array([n]).sum(), "tensor": torch.tensor,
}  # fmt: skip


@MEMBERS
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_of_any_type_are_sizes(name: str, kind: str) -> None:
    integer, make = INTEGERS[kind], FAMILY[name].make
    if isinstance(make, partial):
        whole = {key: integer(n) for key, n in make.keywords.items() if type(n) is int}
        make = partial(make, **whole)
    layer = make(integer(4))
    sizes = {key: value for key, value in vars(FAMILY[name].make(4)).items() if isinstance(value, int)}
    assert {key: (type(value), value) for key, value in vars(layer).items() if key in sizes} == {
        key: (type(value), value) for key, value in sizes.items()
    }
    x = data(torch.float32)
    assert layer(x, *FAMILY[name].extra(len(x))).shape == x.shape


@MEMBERS
@pytest.mark.parametrize("size", [True, np.True_, torch.tensor(True), 4.0, np.float64(4), "4", None])
def test_other_sizes_are_refused(name: str, size: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{name} expects num_features to be an int, got "):
        FAMILY[name].make(size)


def test_domains_and_labels_of_any_integer_type() -> None:
    x = data(torch.float32)
    for layer in (DomainBatchNorm2d(4, num_domains=2), ConditionalBatchNorm2d(4, num_classes=2)):
        assert_close(layer.eval()(x, np.int64(1)), layer(x, 1))
        assert layer.select(np.int64(1)).num_features == 4
        with pytest.raises(TypeError, match="to be an int or an int64 tensor"):
            layer(x, np.True_)
    with nn.use_domain(np.int64(1)):
        assert DomainBatchNorm2d(4, num_domains=2)(x).shape == x.shape


@MEMBERS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
def test_a_trace_computes_the_same_for_other_sizes(name: str, training: bool) -> None:
    def arguments(samples: int, *size: int) -> tuple[Any, ...]:
        return torch.randn(samples, 4, *size, requires_grad=True), *FAMILY[name].extra(samples)

    layer = FAMILY[name].make(4)
    layer(*arguments(6, 3, 5))
    layer.train(training)
    traced = torch.jit.trace(layer, arguments(6, 3, 5))  # compared with a second trace, without gradients
    assert "batchnorm::" not in str(traced.inlined_graph)  # it loads without this library
    plain, given = copy.deepcopy(layer), arguments(8, 4, 2)
    expected, found = plain(*given), traced(*given)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(y.square().sum(), given[0])[0] for y in (found, expected))
    assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)
