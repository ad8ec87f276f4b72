"""The operators that change their arguments."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from batchnorm import reference
from batchnorm.ops import compiled, eager, whitening
from tests.tolerance import assert_within, bound

IMPLEMENTATIONS = {"eager": eager.update_running_, "dispatched": lambda *a: torch.ops.batchnorm.update_running_(*a)}

needs_compiled = pytest.mark.skipif(not compiled.cpu_capabilities(), reason="no compiled operators in this build")


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def update(request: pytest.FixtureRequest):
    return IMPLEMENTATIONS[request.param]


class State:
    def __init__(self, channels: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.mean = torch.linspace(-1, 1, channels, dtype=dtype)
        self.var = torch.linspace(0.5, 2, channels, dtype=dtype)
        self.batches = torch.tensor(4)

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.mean, self.var, self.batches

    def copies(self) -> list[Tensor]:
        return [t.clone() for t in self.buffers]

    def assert_unmoved_from(self, copies: list[Tensor]) -> None:
        for now, before in zip(self.buffers, copies, strict=True):
            assert torch.equal(now, before)


def statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return eager.batch_statistics(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_update_agrees_with_the_reference(update, momentum: float | None, dtype: torch.dtype) -> None:
    state, x = (
        State(dtype=dtype),
        torch.randn(5, 3, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    )
    expected = reference.update_running(
        state.mean.double().numpy(),
        state.var.double().numpy(),
        reference.moments(x.double().numpy()),
        momentum=momentum,
        convention="torch",
        num_batches_tracked=4,
    )
    update(*state.buffers, *statistics(x), 20, None, momentum, False)
    assert state.batches == expected.num_batches_tracked == 5
    for name in ("mean", "var"):
        value = getattr(expected, name)
        assert_within(getattr(state, name), value, bound(np.abs(value) + 1, dtype, value), name)


def test_count_as_a_tensor_replaces_m(update) -> None:
    x, by_count, by_m = torch.randn(5, 3), State(), State()
    update(*by_count.buffers, *statistics(x), 99, torch.tensor(5.0, dtype=torch.float64), 0.1, False)
    update(*by_m.buffers, *statistics(x), 5, None, 0.1, False)
    by_count.assert_unmoved_from(list(by_m.buffers))


def test_a_fractional_count_unbiases_a_weighted_variance(update) -> None:
    x, weights = torch.randn(1, 3, 8), torch.rand(1, 8) + 0.1
    count, mean, mean_low, m2 = eager.moments(x, None, weights, 1)
    first, second = weights.double().sum(), weights.double().square().sum()
    state = State()
    update(*state.buffers, mean, mean_low, (m2 / count).float(), 0, first**2 / second, 1.0, False)
    expected = m2 / count * first**2 / (first**2 - second)
    torch.testing.assert_close(state.var, expected.float())


def test_an_empty_batch_updates_nothing(update) -> None:
    state = State()
    before = state.copies()
    update(*state.buffers, *statistics(torch.empty(0, 3)), 0, None, 0.1, False)
    update(*state.buffers, *statistics(torch.empty(0, 3)), 0, None, None, False)
    state.assert_unmoved_from(before)


def test_one_value_updates_only_the_mean(update) -> None:
    state = State()
    before = state.copies()
    update(*state.buffers, *statistics(torch.randn(1, 3)), 1, None, 0.1, False)
    assert not torch.equal(state.mean, before[0])
    assert torch.equal(state.var, before[1])
    assert state.batches == 5


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])  # of 1e25, only the variance is infinite
def test_skip_nonfinite_changes_nothing(update, value: float, momentum: float | None) -> None:
    x = torch.randn(5, 3)
    x[2, 1] = value
    state = State()
    before = state.copies()
    update(*state.buffers, *statistics(x), 5, None, momentum, True)
    state.assert_unmoved_from(before)
    update(*state.buffers, *statistics(torch.randn(5, 3)), 5, None, momentum, True)
    assert state.batches == 5


def test_propagate_accepts_a_nonfinite_value(update) -> None:
    x = torch.randn(5, 3)
    x[2, 1] = torch.nan
    state = State()
    update(*state.buffers, *statistics(x), 5, None, 0.1, False)
    assert state.mean.isnan().tolist() == state.var.isnan().tolist() == [False, True, False]


def test_a_backward_pass_updates_nothing(update) -> None:
    state = State()
    before = state.copies()
    calls = []

    def hook(gradient: Tensor) -> None:
        update(*state.buffers, *statistics(torch.randn(5, 3)), 5, None, 0.1, False)
        calls.append(gradient)

    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(hook)
    (leaf * 2).backward()
    assert len(calls) == 1
    state.assert_unmoved_from(before)


def test_a_counter_is_needed_only_without_a_momentum(update) -> None:
    state = State()
    update(state.mean, state.var, None, *statistics(torch.randn(5, 3)), 5, None, 0.5, False)
    with pytest.raises(RuntimeError, match="update_running_ expects num_batches_tracked"):
        update(state.mean, state.var, None, *statistics(torch.randn(5, 3)), 5, None, None, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["update_running_", "update_whitening_"])
def test_another_thread_never_reads_intermediate_values(name: str, dtype: torch.dtype) -> None:
    buffers = (torch.ones(2048, dtype=dtype), torch.ones(2048, dtype=dtype), torch.tensor(1))
    batch = (torch.rand(2048),) * 3 + (8,) if name == "update_running_" else (torch.rand(2048),) * 2
    update = IMPLEMENTATIONS["dispatched"] if name == "update_running_" else whitening.update_whitening_  # eager
    stop, seen = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            update(*buffers, *batch, None, 0.0, False)  # momentum 0: the values stay

    torch.set_num_threads(1)
    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(4000):
        snapshot = [t.clone() for t in buffers]
        seen.append(all(bool((t != 0).all()) for t in snapshot))
    stop.set()
    writer.join()
    assert all(seen)
    assert (buffers[0] == 1).all()
    assert (buffers[1] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [torch.int64, torch.float32, torch.int32], ids=str)
def test_autograd_notices_the_change(update, dtype: torch.dtype, count: torch.dtype) -> None:
    state = State(dtype=dtype)
    state.batches = state.batches.to(count)
    before = [t._version for t in state.buffers]
    update(*state.buffers, *statistics(torch.randn(5, 3)), 5, None, 0.1, False)
    assert all(t._version > version for t, version in zip(state.buffers, before, strict=True))
    assert state.batches == 5


@needs_compiled
@pytest.mark.parametrize("unwritable", [0, 1, 2])
@pytest.mark.parametrize("kind", ["expanded", "inference", "leaf"])
def test_the_operator_writes_all_or_nothing(kind: str, unwritable: int) -> None:
    buffers = [torch.zeros(3), torch.ones(3), torch.tensor(4.0)]
    if kind == "expanded":
        buffers[unwritable] = buffers[unwritable].flatten()[:1].expand(3)  # of a counter: too many values
    elif kind == "inference":
        with torch.inference_mode():
            buffers[unwritable] = buffers[unwritable].clone()
    else:
        buffers[unwritable].requires_grad_()
    before = [t.detach().clone() for t in buffers]
    with pytest.raises(RuntimeError, match="to be a buffer that can be written|of one value"):
        torch.ops.batchnorm.update_running_(*buffers, *statistics(torch.randn(5, 3)), 5, None, 0.1, False)
    assert all(torch.equal(t, old) for t, old in zip(buffers, before, strict=True))
