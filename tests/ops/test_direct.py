"""When a call goes to the implementation for CUDA without torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import batchnorm
from batchnorm.ops import derivatives, direct, registration, strict

X, VECTOR = torch.ones(2, 3), torch.ones(3)


class _Subclass(Tensor):
    pass


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_only_plain_tensors_of_a_gpu_are_direct() -> None:
    assert direct.unobserved((X, None, torch.nn.Parameter(VECTOR)))
    assert not direct.unobserved((X, VECTOR.as_subclass(_Subclass)))
    assert not direct.is_direct(X)


def test_tensors_whose_memory_does_not_hold_their_values_are_not_direct() -> None:
    negative = torch.complex(X, X).conj().imag
    assert torch.equal(negative, -X)
    assert not direct.unobserved((X, negative))
    assert not direct.unobserved((X, torch._efficientzerotensor((2, 3))))


@pytest.mark.parametrize("observer", [_Mode, torch.profiler.profile], ids=["mode", "profiler"])
def test_a_call_that_somebody_observes_is_not_direct(observer: Callable[[], AbstractContextManager[object]]) -> None:
    with observer():
        assert not direct.unobserved((X,))
    assert direct.unobserved((X,))


def test_a_call_under_a_transform_is_not_direct() -> None:
    seen = []
    torch.vmap(lambda x: seen.append(direct.unobserved((x,))) or x)(X)
    assert seen == [False]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let tensors on the CPU be direct, and return the names of the functions that are called."""
    names: list[str] = []

    def together(*args: Any) -> Any:
        names.append("train_forward_and_update_")
        found = torch.ops.batchnorm.train_forward(*args[:7])
        operator(*args[7:10], *found[1:], args[0].numel() // 3, None, args[10], False)
        return found

    def update(*args: Any) -> None:
        names.append("update_running_")
        operator(*args)

    monkeypatch.setattr(strict, "AVAILABLE", False)
    operator = batchnorm.ops.routes._ops.update_running_
    monkeypatch.setattr(direct, "is_direct", lambda *tensors: direct.unobserved(tensors))
    monkeypatch.setattr(direct, "train_forward_and_update_", together)
    monkeypatch.setattr(batchnorm.ops.routes._ops, "update_running_", update)
    return names


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "train_forward_and_update_"), ({"momentum": None}, "update_running_"),
        ({"on_nonfinite": "skip"}, "update_running_"),
    ],
    ids=["momentum", "cumulative", "skip"],
)  # fmt: skip
def test_a_layer_updates_with_forward_if_one_channel_suffices_to_decide(
    monkeypatch: pytest.MonkeyPatch, called: list[str], gradient: bool, options: dict[str, Any], expected: str
) -> None:
    def refused(*args: Any) -> Any:
        pytest.fail("the kernels need a device")

    for name in registration.ON_CUDA:
        monkeypatch.setitem(registration.ON_CUDA, name, refused)
    monkeypatch.setattr(derivatives, "train_forward", torch.ops.batchnorm.train_forward.default)
    monkeypatch.setattr(batchnorm.ops.routes, "train_forward", torch.ops.batchnorm.train_forward.default)
    layer, plain = batchnorm.BatchNorm1d(3, **options), batchnorm.BatchNorm1d(3, **options)
    x = torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 9.0]], requires_grad=gradient)
    y = layer.requires_grad_(gradient)(x)
    assert called == [expected]
    monkeypatch.undo()
    assert torch.equal(y, plain(x))
    assert int(layer.num_batches_tracked) == 1
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


def test_a_call_while_gradients_are_enabled_goes_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "is_direct", lambda *tensors: True)
    monkeypatch.setitem(registration.ON_CUDA, "normalize", lambda *args: "direct")
    normalize = direct.operator("normalize", 8)
    arguments = (X, VECTOR, None, VECTOR, None, None, None, None, 1e-5, "none", 0.0)
    assert torch.is_tensor(normalize(*arguments))
    with torch.no_grad():
        assert normalize(*arguments) == "direct"
