"""torch's own module inputs for `nn.BatchNorm1d/2d/3d` against ours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.testing._internal.common_modules import ErrorModuleInput, ModuleErrorEnum, ModuleInput, module_db

import batchnorm

INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


def module_inputs(name: str, dtype: torch.dtype, *, training: bool) -> list[ModuleInput]:
    info = INFOS[name]
    torch.manual_seed(0)
    return info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)


def every_input() -> Iterator[Any]:
    for name, info in INFOS.items():
        for dtype in info.dtypes:
            for training in (True, False):
                for number, given in enumerate(module_inputs(name, dtype, training=training)):
                    mode = "train" if training else "eval"
                    label = "-".join([name, str(dtype).removeprefix("torch."), mode, given.desc or str(number)])
                    yield pytest.param(name, dtype, training, given, id=label)


EVERY_INPUT = pytest.mark.parametrize(("name", "dtype", "training", "given"), [*every_input()])


def pair(name: str, dtype: torch.dtype, training: bool, given: ModuleInput) -> tuple[nn.Module, nn.Module]:
    """Return our layer and torch's, with the same arguments and random parameters and buffers."""
    made = given.constructor_input
    ours = getattr(batchnorm, name)(*made.args, **made.kwargs, dtype=dtype)
    theirs = getattr(nn, name)(*made.args, **made.kwargs, dtype=dtype)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.uniform_(0.5, 2.0) if tensor.is_floating_point() else tensor.fill_(3)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Return y, every gradient, and the buffers afterwards; torch's layer runs in float64."""
    theirs = theirs.double()
    ours_x, theirs_x = leaf(x), leaf(x.double())
    y, expected = ours(ours_x), theirs(theirs_x)
    assert_close(y, expected.to(x.dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    assert_close(ours_x.grad, theirs_x.grad.to(x.dtype))
    for key, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(key).grad, parameter.grad.to(x.dtype))
    state, expected_state = ours.state_dict(), theirs.to(x.dtype).state_dict()
    if not x.numel() and ours.training:
        # torch counts an empty batch, though it moves nothing; the next cumulative average would weigh it.
        assert expected_state.pop("num_batches_tracked") > state.pop("num_batches_tracked") == 3
    assert_close(state, expected_state)


def test_there_are_inputs() -> None:
    assert set(INFOS) == {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    for name in INFOS:
        assert len(module_inputs(name, torch.float32, training=True)) >= 6


@EVERY_INPUT
def test_a_step_is_torchs(name: str, dtype: torch.dtype, training: bool, given: ModuleInput) -> None:
    ours, theirs = pair(name, dtype, training, given)
    for _ in range(2):
        assert_same_step(ours, theirs, given.forward_input.args[0])


@EVERY_INPUT
def test_layouts_give_the_same_result_and_are_kept(
    name: str, dtype: torch.dtype, training: bool, given: ModuleInput
) -> None:
    x = given.forward_input.args[0].detach()
    layouts = [torch.stack([x, x], -1)[..., 0], x.transpose(0, -1).contiguous().transpose(0, -1)]
    if x.dim() in (4, 5):
        layouts.append(x.contiguous(memory_format=[torch.channels_last, torch.channels_last_3d][x.dim() - 4]))
    for placed in layouts:
        ours, theirs = pair(name, dtype, training, given)
        assert ours(placed).stride() == torch.empty_like(placed).stride()
        theirs(placed)
        assert_same_step(ours, theirs, placed)


@EVERY_INPUT
def test_copies_and_pickles_do_the_same(name: str, dtype: torch.dtype, training: bool, given: ModuleInput) -> None:
    layer, _ = pair(name, dtype, training, given)
    x = given.forward_input.args[0].detach()
    again = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(copy.deepcopy(layer))]
    expected = layer(x)
    for other in again:
        assert type(other) is type(layer)
        assert other.training == training
        assert torch.equal(other(x), expected)
        assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
        assert repr(other) == repr(layer)


@EVERY_INPUT
def test_repr_is_torchs(name: str, dtype: torch.dtype, training: bool, given: ModuleInput) -> None:
    ours, theirs = pair(name, dtype, training, given)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", INFOS)
def test_derivatives_by_differences(name: str, training: bool) -> None:
    for given in module_inputs(name, torch.float64, training=training):
        layer, _ = pair(name, torch.float64, training, given)
        layer.update_running_stats = False
        keys = [key for key, _ in layer.named_parameters()]

        def function(x: Tensor, *parameters: Tensor, layer: nn.Module = layer, keys: list[str] = keys) -> Tensor:
            return torch.func.functional_call(layer, dict(zip(keys, parameters, strict=True)), (x,))

        inputs = (leaf(given.forward_input.args[0]), *(leaf(p) for p in layer.parameters()))
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def error_inputs(name: str) -> list[ErrorModuleInput]:
    info = INFOS[name]
    return info.module_error_inputs_func(info, "cpu", torch.float32, requires_grad=True, training=True)


@pytest.mark.parametrize("name", INFOS)
def test_inputs_that_torch_refuses_are_refused(name: str) -> None:
    refused = error_inputs(name)
    assert refused
    for error in refused:
        assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        # Torch notices at the first forward; ours cannot be made.
        with pytest.raises(error.error_type, match="expects eps > 0, got"):
            getattr(batchnorm, name)(*made.args, **made.kwargs)
        with pytest.raises(error.error_type, match="expects eps > 0, got"):
            _set_later(getattr(batchnorm, name)(*made.args), made.kwargs["eps"])(*given.args)


def _set_later(layer: nn.Module, eps: float) -> nn.Module:
    layer.eps = eps  # an error, except for 0, which evaluation accepts
    return layer
