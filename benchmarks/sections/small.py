"""Layers of small tensors, and the network of the demo: times in which calls count, and not arithmetic.

The section small-python measures the same without the node in C++.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.ops import strict
from batchnorm.ops.compiled import AUTOGRAD
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import alternate
from benchmarks.subjects.cases import shape_text
from benchmarks.subjects.peers import OURS, TORCH

FLOOR = "floor"
NETWORK = "784-64-128-10"
KEY = ("threads", "pass", "shape", "dtype", "activation")
SHAPES = ((64, 64), (128, 64), (256, 256), (8, 16, 14, 14))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS = ("none", "relu")
PASSES = ("step", "forward", "inference")
SIZES = (784, 64, 128, 10)

# Threads that wait for others sleep. Otherwise one other process on the machine makes a call take 0.1 s.
SETTINGS: dict[str, dict[str, str] | None] = {"default": {"OMP_WAIT_POLICY": "PASSIVE"}}
PYTHON_SETTINGS: dict[str, dict[str, str] | None] = {"default": {"OMP_WAIT_POLICY": "PASSIVE", AUTOGRAD: "python"}}

Call = Callable[[], Any]


class _Unfused(nn.Module):
    """torch's batch normalization, and ReLU as most code calls it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.norm(x))


class _Least(nn.Module):
    """One operation of torch: the least that a layer takes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class _Calls(torch.autograd.Function):
    """A layer's calls of the operators, without checks and without anything else that a layer must do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, options: tuple[Any, ...]) -> Tensor:
        y: Tensor
        y, statistics = strict._train_forward(x, weight, bias, None, *options)
        ctx.save_for_backward(x, statistics, weight, bias)
        ctx.attributes = options[3:6]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, statistics, weight, bias = ctx.saved_tensors
        dx, dweight, dbias, _ = strict._train_backward(
            dy, x, None, None, statistics, weight, bias, *ctx.attributes, False
        )
        return dx, dweight, dbias, None


# As for the layers' Function: without the parts of torch that are written in Python.
_apply_calls = super(torch.autograd.Function, _Calls).apply
_Calls._backward_cls.apply = _Calls.backward  # type: ignore[attr-defined]


class _Operators(nn.Module):
    """The least that a layer takes if its node is in Python."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.attributes = (self.norm.eps, strict._NUMBERS[activation], 0.0)

    def to(self, *arguments: Any, **options: Any) -> _Operators:
        super().to(*arguments, **options)
        running = tuple(self.norm._buffers.values())
        self.training_call = (*self.norm._parameters.values(), (*running, *self.attributes, 0.1, False))
        self.inference_call = (*running[:2], *self.norm._parameters.values(), None, *self.attributes)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return _apply_calls(x, *self.training_call)
        return strict._normalize(x, *self.inference_call)


def _layers(rank: int, channels: int, activation: str) -> dict[str, nn.Module]:
    suffix = f"{rank - 2 or 1}d"
    torchs: nn.Module = getattr(nn, f"BatchNorm{suffix}")(channels)
    floor = _Least() if strict._native is not None else _Operators(channels, activation)
    if activation == "none":
        return {OURS: getattr(batchnorm, f"BatchNorm{suffix}")(channels), TORCH: torchs, FLOOR: floor}
    ours = getattr(batchnorm, f"BatchNormAct{suffix}")(channels, activation=activation)
    return {OURS: ours, TORCH: _Unfused(torchs), FLOOR: floor}


def _call(model: nn.Module, x: Tensor, dy: Tensor, what: str) -> Call:
    if what == "forward":
        return lambda: model(x)
    if what == "inference":
        model.eval()

        def infer() -> Tensor:
            with torch.no_grad():
                y: Tensor = model(x)
                return y

        return infer
    leaves = [x, *model.parameters()]

    def step() -> None:
        model(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return step


def _network(normalized: Callable[[int], list[nn.Module]]) -> nn.Module:
    parts: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(SIZES[:-1]):
        parts += [nn.Linear(wide, narrow), *normalized(narrow)]
    return nn.Sequential(*parts, nn.Linear(*SIZES[-2:]))


def _networks(activation: str) -> dict[str, nn.Module]:
    if activation == "none":
        ours = _network(lambda c: [batchnorm.BatchNorm1d(c), nn.ReLU()])
    else:
        ours = _network(lambda c: [batchnorm.BatchNormAct1d(c)])
    torchs = _network(lambda c: [nn.BatchNorm1d(c), nn.ReLU()])
    return {OURS: ours, TORCH: torchs, FLOOR: _network(lambda c: [nn.ReLU()])}


def measure_small(options: Options, table: Table) -> None:
    """Write the tenth percentile and the minimum of the contenders' times, in microseconds."""
    threads_before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for what in PASSES:
                for dtype in DTYPES:
                    for shape in SHAPES[:1] if options.quick else SHAPES:
                        for activation in ACTIVATIONS:
                            x, dy = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(2))
                            x.requires_grad_(what != "inference")
                            models = _layers(len(shape), shape[1], activation)
                            calls = {name: _call(m.to(DTYPES[dtype]), x, dy, what) for name, m in models.items()}
                            _measure(options, table, (str(threads), what, shape_text(shape), dtype, activation), calls)
            for activation in ACTIVATIONS:
                x, dy = torch.randn(64, SIZES[0]), torch.randn(64, SIZES[-1])
                calls = {name: _call(m, x, dy, "step") for name, m in _networks(activation).items()}
                _measure(options, table, (str(threads), "step", NETWORK, "float32", activation), calls)
    finally:
        torch.set_num_threads(threads_before)


def _measure(options: Options, table: Table, key: tuple[str, ...], calls: dict[str, Call]) -> None:
    if key in table.measured() or options.only not in key[2]:
        return
    times = alternate(calls, options.seconds, most=400)
    row: Row = dict(zip(KEY, key, strict=True))
    for name, found in times.items():
        row[f"{name}_us"], row[f"{name}_least_us"] = 1e6 * found.percentile(10), 1e6 * found.percentile(0)
    table.append([row])
    print(f"{', '.join(key)}: " + ", ".join(f"{name} {row[f'{name}_us']:.3g}" for name in times) + " µs", flush=True)
