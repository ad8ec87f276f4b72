"""FrozenBatchNorm: running statistics in both modes, derivatives of an affine map, any checkpoint."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from batchnorm import reference
from batchnorm.nn import frozen as frozen_module
from batchnorm.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from tests.cases import CASES, EPS, Case, ids
from tests.tolerance import Terms, assert_within, bound

RANKS = {
    FrozenBatchNorm: (4, 3, 2, 3, 2, 2),
    FrozenBatchNorm1d: (4, 3, 5),
    FrozenBatchNorm2d: (4, 3, 5, 6),
    FrozenBatchNorm3d: (4, 3, 2, 5, 6),
}


def wide(t: Tensor | None) -> np.ndarray | None:
    return None if t is None else t.detach().double().numpy()


def layer_of(case: Case) -> FrozenBatchNorm:
    weight, bias = case.parameters()
    mean, var = case.running()
    layer = FrozenBatchNorm(case.shape[1], EPS, bias=bias is not None, trainable_affine=True)
    layer.weight = None if weight is None else nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    layer.running_mean, layer.running_var = mean, var
    return layer


def reference_of(case: Case) -> reference.Forward:
    return reference.forward_inference(*map(wide, (case.x(), *case.running(), *case.parameters())), eps=EPS)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_and_gradients_agree_with_the_reference(case: Case) -> None:
    layer, x, dy, expected = layer_of(case), case.x().requires_grad_(), case.random(4), reference_of(case)
    before = copy.deepcopy(layer.state_dict())
    y = layer.train()(x)
    assert (y.dtype, y.stride()) == (x.dtype, torch.empty_like(x).stride())
    terms, gradients = Terms(expected, None, wide(layer.bias)), reference.backward(wide(dy), expected)
    assert_within(y, expected.y, bound(terms.z, case.dtype, expected.y), "y")
    y.backward(dy)
    size = np.abs(wide(dy))
    sum_dy, sum_dy_x_hat = terms.sums(size, like=expected.weight)
    assert_within(x.grad, gradients.dx, bound(terms.dx(size), case.dtype, gradients.dx), "dx")
    if layer.weight is not None:
        held = layer.weight.dtype
        rounded = gradients.dweight if held in (torch.float16, torch.bfloat16) else None
        assert_within(layer.weight.grad, gradients.dweight, bound(sum_dy_x_hat, held, rounded), "dweight")
    if layer.bias is not None:
        held = layer.bias.dtype
        rounded = gradients.dbias if held in (torch.float16, torch.bfloat16) else None
        assert_within(layer.bias.grad, gradients.dbias, bound(sum_dy, held, rounded), "dbias")
    assert torch.equal(layer.eval()(x), y)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float64], ids=ids)
def test_double_backward_agrees_with_the_reference(case: Case) -> None:
    layer, x, dy, forward = (
        layer_of(case),
        case.x().requires_grad_(),
        case.random(4).requires_grad_(),
        reference_of(case),
    )
    leaves = (x, layer.weight, layer.bias)
    found = torch.autograd.grad(layer(x), leaves, dy, create_graph=True)
    v = [case.random(5), torch.randn(case.shape[1]).double(), torch.randn(case.shape[1]).double()]
    actual = torch.autograd.grad(found, (dy, x, layer.weight), v)
    expected = reference.double_backward(*map(wide, v), wide(dy), forward)
    assert_close(actual[0], torch.from_numpy(expected.dz), rtol=1e-12, atol=1e-12)
    assert_close(actual[1], torch.from_numpy(expected.dx), rtol=1e-12, atol=1e-12)
    assert_close(actual[2], torch.from_numpy(expected.dweight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", RANKS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_it_compiles_without_a_break(layer: type[FrozenBatchNorm], training: bool) -> None:
    torch._dynamo.reset()
    eager = layer(3, trainable_affine=True).train(training)
    nn.init.uniform_(eager.running_mean), nn.init.uniform_(eager.weight)
    again = copy.deepcopy(eager)
    x = torch.randn(RANKS[layer])
    compiled, found = torch.compile(again, backend="aot_eager", fullgraph=True), []
    for call in (eager, compiled):
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert_close(*found)
    assert_close(again.weight.grad, eager.weight.grad)
    assert_close(compiled(x), eager(x))
    assert torch.equal(again.running_mean, eager.running_mean)
    torch._dynamo.reset()


@pytest.mark.parametrize("layer", RANKS)
def test_it_is_torchs_layer_in_evaluation_and_takes_one_value(layer: type[FrozenBatchNorm]) -> None:
    class AnyRank(nn.modules.batchnorm._BatchNorm):
        def _check_input_dim(self, input: Tensor) -> None:
            pass

    theirs = AnyRank(3)
    for tensor in theirs.state_dict().values():
        tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.fill_(7)
    ours = layer(3)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
    x = torch.randn(RANKS[layer])
    assert_close(ours.train()(x), theirs.eval()(x))
    one = torch.randn(1, 3, *[1] * (x.dim() - 2))
    assert_close(ours(one), theirs(one))
    assert ours(x[:0]).shape == x[:0].shape
    assert ours.num_batches_tracked == 7


def test_gamma_and_beta_train_if_requested() -> None:
    fixed, trained = FrozenBatchNorm2d(3), FrozenBatchNorm2d(3, trainable_affine=True)
    assert [p.requires_grad for p in fixed.parameters()] == [False, False]
    assert [p.requires_grad for p in trained.parameters()] == [True, True]
    assert set(fixed.state_dict()) == set(nn.BatchNorm2d(3).state_dict())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fixed(x).sum().backward()
    assert x.grad is not None
    fixed.trainable_affine = True
    assert fixed.weight.requires_grad and fixed.bias.requires_grad
    assert "trainable_affine=True" in repr(fixed)
    fixed.trainable_affine = False
    assert not fixed.trainable_affine
    assert not FrozenBatchNorm2d(3, affine=False, trainable_affine=True).trainable_affine


def test_copies_and_pickles_are_the_same_layer() -> None:
    layer = FrozenBatchNorm2d(3, 1e-3, 0.2, bias=False, trainable_affine=True)
    layer.running_mean.fill_(2.0)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for again in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert repr(again) == repr(layer)
        assert torch.equal(again(torch.ones(1, 3, 2, 2)), layer(torch.ones(1, 3, 2, 2)))


class TorchvisionFrozen(nn.Module):
    """With the buffers of torchvision.ops.FrozenBatchNorm2d."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(3) + 0.5)


@pytest.mark.parametrize("in_model", [False, True], ids=["layer", "in_model"])
@pytest.mark.parametrize("metadata", [False, True], ids=["plain", "metadata"])
@pytest.mark.parametrize(
    "source",
    [
        nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, bias=False), nn.SyncBatchNorm(3),
        TorchvisionFrozen(), FrozenBatchNorm2d(3),
    ],
    ids=["affine", "no_affine", "no_bias", "sync", "torchvision", "frozen"],
)  # fmt: skip
def test_it_loads_any_checkpoint(source: nn.Module, metadata: bool, in_model: bool) -> None:
    layer = FrozenBatchNorm2d(3)
    with torch.no_grad():
        layer.weight.fill_(5), layer.bias.fill_(5), layer.num_batches_tracked.fill_(9)
        source.running_mean.fill_(0.25)
    state = (nn.Sequential(source) if in_model else source).state_dict()
    given = state if metadata else dict(state)
    keys = list(given)
    assert (
        str((nn.Sequential(layer) if in_model else layer).load_state_dict(given)) == "<All keys matched successfully>"
    )
    assert list(given) == keys
    assert (layer.running_mean == 0.25).all()
    expected_weight = torch.ones(3) if getattr(source, "weight", None) is None else source.weight
    expected_bias = torch.zeros(3) if getattr(source, "bias", None) is None else source.bias
    assert torch.equal(layer.weight, expected_weight)
    assert torch.equal(layer.bias, expected_bias)
    assert layer.num_batches_tracked == (0 if hasattr(source, "num_batches_tracked") else 9)


def test_it_loads_into_a_layer_that_has_no_memory_yet() -> None:
    source = nn.BatchNorm2d(3, affine=False)
    layer = FrozenBatchNorm2d(3, device="meta")
    state = source.state_dict()
    del state["num_batches_tracked"]
    layer.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 4, 4)
    assert_close(layer(x), source.eval()(x))
    assert layer.num_batches_tracked == 0


def test_a_checkpoint_of_something_else_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\", \"bias\", \"running_mean\""):
        FrozenBatchNorm2d(3).load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for running_mean"):
        FrozenBatchNorm2d(3).load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("rank", "123")
def test_the_fused_layer_freezes_too(rank: str) -> None:
    frozen = getattr(frozen_module, f"FrozenBatchNormAct{rank}d")
    layer = frozen(3, activation="leaky_relu", negative_slope=0.3, on_nonfinite="skip")
    assert not layer.trainable_affine
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    plain = getattr(frozen_module, f"FrozenBatchNorm{rank}d")(3)
    nn.init.uniform_(layer.running_mean), nn.init.uniform_(layer.weight)
    plain.load_state_dict(layer.state_dict())
    x, residual = torch.randn(2, 4, 3, *[5] * int(rank))
    for training in (True, False):
        layer.train(training)
        assert_close(layer(x), nn.functional.leaky_relu(plain(x), 0.3))
        assert_close(layer(x, residual), nn.functional.leaky_relu(plain(x) + residual, 0.3))
    assert layer.num_batches_tracked == 0
    assert "activation='leaky_relu'" in repr(layer)


def test_a_mask_is_taken_and_changes_nothing() -> None:
    layer, x = FrozenBatchNorm1d(3), torch.randn(2, 3, 4)
    assert torch.equal(layer(x, torch.ones(2, 4, dtype=torch.bool)), layer(x))
    with pytest.raises(ValueError, match=r"FrozenBatchNorm1d expects a mask of shape \[N, \*S\]"):
        layer(x, torch.ones(2, 3, 4, dtype=torch.bool))


@pytest.mark.parametrize("layer", RANKS)
def test_a_mistake_raises_an_error(layer: type[FrozenBatchNorm]) -> None:
    name = layer.__name__
    with pytest.raises(ValueError, match=rf"^{name} expects track_running_stats=True, got False. .* use BatchNorm"):
        layer(3, track_running_stats=False)
    with pytest.raises(ValueError, match=rf"^{name} expects eps > 0"):
        layer(3, eps=0.0)
    with pytest.raises(ValueError, match=rf"^{name} expects x of shape"):
        layer(3)(torch.zeros(3))
    with pytest.raises(TypeError, match="positional"):
        layer(3, 1e-5, 0.1, True, True, None, None, True)
