"""Gradient accumulation: the horizon of the running statistics, and the guide's claims about exact statistics."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.nn.accumulation import microbatch_momentum, momentum_per_microbatch

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "gradient-accumulation.md"


# The momentum


@pytest.mark.parametrize("k", [1, 2, 7, 1000])
@pytest.mark.parametrize("momentum", [0.0, 1e-12, 0.01, 0.1, 0.9, 1.0])
def test_k_updates_weight_the_past_like_one(momentum: float, k: int) -> None:
    each = momentum_per_microbatch(momentum, k)
    assert each is not None
    assert 0.0 <= each <= momentum
    assert (1.0 - each) ** k == pytest.approx(1.0 - momentum, rel=1e-12)
    assert each * k == pytest.approx(momentum, rel=1e-9) or momentum > 1e-12  # no digits are lost where it is small


def test_one_microbatch_changes_nothing_and_no_momentum_stays_none() -> None:
    assert momentum_per_microbatch(0.1, 1) == pytest.approx(0.1, rel=1e-15)
    assert momentum_per_microbatch(None, 4) is None


@pytest.mark.parametrize(
    ("momentum", "k", "error", "message"),
    [
        (1.5, 2, ValueError, r"momentum_per_microbatch expects momentum in \[0, 1\] or None, got 1.5"),
        (0.1, 0, ValueError, "momentum_per_microbatch expects k >= 1, got 0. It is the number of microbatches per"),
        (0.1, 2.0, TypeError, r"momentum_per_microbatch expects k to be an int, got 2.0 \(float\). It is the number"),
        (0.1, True, TypeError, r"expects k to be an int, got True \(bool\)"),
    ],
)
def test_a_wrong_argument_raises_an_error(momentum: float, k: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        momentum_per_microbatch(momentum, k)


@pytest.mark.parametrize("make", [bn.BatchNorm2d, nn.BatchNorm2d, bn.BatchNormAct2d])
def test_the_horizon_under_accumulation_is_that_of_whole_batches(make: Callable[..., Any]) -> None:
    whole, parts = (make(3, momentum=0.2, dtype=torch.float64) for _ in range(2))
    microbatch = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 2.0
    n = microbatch.numel() // 3
    with microbatch_momentum(parts, 4):
        for _ in range(3):
            whole(microbatch.repeat(4, 1, 1, 1))
            for _ in range(4):
                parts(microbatch)
    assert_close(parts.running_mean, whole.running_mean)
    # The same values four times have the same biased variance, and another unbiased one.
    moved = 1.0 - 0.8**3
    unbiased = n / (n - 1) * (4 * n - 1) / (4 * n)
    assert_close((parts.running_var - 0.8**3) / moved, (whole.running_var - 0.8**3) / moved * unbiased)
    assert parts.momentum == 0.2
    assert parts.num_batches_tracked == 12


def model_of() -> nn.Sequential:
    shared = bn.BatchNorm2d(3, momentum=0.3)
    return nn.Sequential(shared, nn.BatchNorm2d(3), nn.InstanceNorm2d(3), shared, bn.BatchNorm2d(3, momentum=None))


def momenta(model: Iterable[nn.Module]) -> list[Any]:
    return [layer.momentum for layer in model]


def test_a_whole_model_is_set_once_and_restored() -> None:
    model = model_of()
    former = momenta(model)
    each = momentum_per_microbatch(0.3, 4)

    def fails_within() -> None:
        with microbatch_momentum(model, 4):
            assert momenta(model) == [each, momentum_per_microbatch(0.1, 4), 0.1, each, None]
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fails_within()
    assert momenta(model) == former
    microbatch_momentum(model, 4)
    assert model[0].momentum == each


def test_a_model_that_cannot_be_set_does_not_change() -> None:
    model = model_of()
    model[1].momentum = 2.0
    former = momenta(model)
    with pytest.raises(ValueError, match=r"microbatch_momentum, at '1', expects momentum in \[0, 1\] or None, got 2.0"):
        microbatch_momentum(model, 4)
    with pytest.raises(ValueError, match="microbatch_momentum expects k >= 1, got 0"):
        microbatch_momentum(model, 0)
    assert momenta(model) == former
    with pytest.raises(ValueError, match=r"expects a model with batch normalization, got Linear with none. Other norm"):
        microbatch_momentum(nn.Linear(3, 3), 4)


# The costs in the guide


class Cost(TorchDispatchMode):
    """Return the peak bytes of the tensors that a computation creates, and its number of forward convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.convolutions = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage(), given)
        self.convolutions += function is torch.ops.aten.convolution.default
        return result

    def count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def block(channels: int, momentum: float) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), bn.BatchNormAct2d(32, momentum=momentum))


class Network(nn.Module):
    """Eight blocks of convolution, batch normalization and ReLU; each checkpoint has `segment` blocks, 0 for none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(3, 0.1), *(block(32, 0.1) for _ in range(7)))
        self.segment = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.segment:
            return self.blocks(x)
        for start in range(0, len(self.blocks), self.segment):
            x = checkpoint(self.blocks[start : start + self.segment], x, use_reentrant=False)
        return x


def step(model: Network, x: Tensor, k: int) -> None:
    for microbatch in x.chunk(k):
        (model(microbatch).square().mean() / k).backward()


WAYS = {  # how the guide names it: microbatches, blocks to a checkpoint
    "whole batch": (1, 0),
    "4 microbatches": (4, 0),
    "whole batch, a checkpoint per block": (1, 1),
    "whole batch, a checkpoint per 2 blocks": (1, 2),
}


def table() -> dict[str, tuple[int, int]]:
    """Return peak memory in MiB and forward passes of each method, from the guide."""
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| (\d+) MiB \| (\d) \|", GUIDE.read_text(), re.MULTILINE)
    return {way: (int(peak), int(passes)) for way, peak, passes in rows}


def test_the_guides_table_names_every_method() -> None:
    assert list(table()) == list(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_memory_and_passes_agree_with_the_guide(way: str) -> None:
    k, segment = WAYS[way]
    model, x = Network(), torch.randn(32, 3, 32, 32)
    model.segment = segment
    step(model, x, k)  # makes the gradients, which count for none of the ways
    cost = Cost()
    with cost:
        step(model, x, k)
    peak, passes = table()[way]
    assert cost.peak / 2**20 == pytest.approx(peak, abs=0.5)
    assert cost.convolutions == passes * k * len(model.blocks)


@pytest.mark.parametrize("segment", [1, 2])
def test_two_passes_are_exact(segment: int) -> None:
    whole, again = (copy.deepcopy(m) for m in [Network().double()] * 2)
    again.segment = segment
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for model in (whole, again):
        step(model, x, 1)
    assert_close(again.state_dict(), whole.state_dict())
    for ours, its in zip(again.parameters(), whole.parameters(), strict=True):
        assert_close(ours.grad, its.grad)
    assert again.blocks[0][1].num_batches_tracked == 1


def test_microbatches_are_not_exact_whatever_the_momentum() -> None:
    whole, again = (copy.deepcopy(m) for m in [Network().double()] * 2)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    step(whole, x, 1)
    with microbatch_momentum(again, 4):
        step(again, x, 4)
    ours, its = (m.blocks[0][0].weight.grad for m in (again, whole))
    assert (ours - its).norm() > 0.05 * its.norm()
