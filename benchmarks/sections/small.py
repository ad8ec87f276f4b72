"""Layers of small tensors, and the network of the demo: times in which calls count, and not arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import batchnorm
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


def _layers(rank: int, channels: int, activation: str) -> dict[str, nn.Module]:
    suffix = f"{rank - 2 or 1}d"
    torchs: nn.Module = getattr(nn, f"BatchNorm{suffix}")(channels)
    if activation == "none":
        return {OURS: getattr(batchnorm, f"BatchNorm{suffix}")(channels), TORCH: torchs, FLOOR: _Least()}
    ours = getattr(batchnorm, f"BatchNormAct{suffix}")(channels, activation=activation)
    return {OURS: ours, TORCH: _Unfused(torchs), FLOOR: _Least()}


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
