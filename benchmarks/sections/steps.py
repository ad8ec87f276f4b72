"""Training steps and inference of whole networks: torch's layers, accelerated ones, and no normalization, in turns.

The network without normalization shows how much time there is to gain. The allocator settings alternate, too, because a
machine's speed changes within minutes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn import functional as F

from batchnorm.surgery.accelerate import accelerate
from benchmarks.measuring import records
from benchmarks.measuring.options import Options
from benchmarks.measuring.records import Row, Table
from benchmarks.measuring.timing import in_rounds, with_interval
from benchmarks.subjects.cases import LAYOUTS
from benchmarks.subjects.networks import NETWORKS, without_norm

KEY = ("network", "task", "layout", "precision")
TRAINING, INFERENCE = "training step", "inference"
TASKS = (TRAINING, INFERENCE)
AUTOCAST = "bfloat16 autocast"
PRECISIONS = ("float32", AUTOCAST)
TORCH, ACCELERATED, NONE = "torch", "accelerated", "none"
CONTENDERS = (TORCH, ACCELERATED, NONE)
ELAPSED, CPU = "elapsed_ms", "cpu_ms"

# MobileNetV2, EfficientNet-B0 and the U-Net then have tensors above 32 MB, which the default allocator does not keep.
BATCH = {"MobileNetV2": 16, "EfficientNet-B0": 16, "residual U-Net": 16}
OTHER_BATCH, SIZE = 8, 160
QUICK, QUICK_BATCH, SMALL = ("MobileNetV2", "residual U-Net"), 2, 64

# Threads that wait for others sleep, so that CPU time is work. Otherwise they would spin in all serial parts of a step.
SETTINGS: dict[str, dict[str, str] | None] = {"both": {"OMP_WAIT_POLICY": "PASSIVE"}}
DEFAULT, KEPT = records.ALLOCATORS
ALLOCATORS = {TRAINING: (DEFAULT, KEPT), INFERENCE: (KEPT,)}


def check_gradients(torchs: torch.nn.Module, ours: torch.nn.Module, images: torch.Tensor) -> None:
    """Raise unless every gradient of two networks in float64 is the same."""
    gradients = []
    for model in (torchs, ours):
        torch.manual_seed(0)  # dropout
        model(images).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    largest = max(float(g.abs().max()) for g in gradients[0])  # some gradients are only rounding: β before another BN
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / largest
    if not difference < 1e-9:
        raise RuntimeError(f"the networks must have the same gradients in float64; they differ by {difference:.1e}")


def _autocast(precision: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", torch.bfloat16)


def _training_step(model: torch.nn.Module, images: torch.Tensor, precision: str) -> Callable[[], None]:
    """Return a call that takes one step of plain gradient descent; the labels are classes of images or of pixels."""
    with torch.no_grad():
        classes, *pixels = model.eval()(images[:1]).shape[1:]
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-5)
    labels = torch.randint(classes, (len(images), *pixels), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad()
        with _autocast(precision):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _inference(model: torch.nn.Module, images: torch.Tensor, precision: str) -> Callable[[], None]:
    model.eval()

    def infer() -> None:
        with torch.no_grad(), _autocast(precision):
            model(images)

    return infer


_CALLS = {TRAINING: _training_step, INFERENCE: _inference}


def measure_networks(options: Options, table: Table) -> None:
    """Write one row for each round."""
    done = table.measured()
    for network, build in NETWORKS.items():
        if options.quick and network not in QUICK:
            continue
        left = [
            cell
            for cell in itertools.product(TASKS, LAYOUTS, PRECISIONS)
            if options.only in ", ".join((network, *cell)) and (network, *cell) not in done
        ]
        if left:
            _measure_network(options, table, network, build, left)


def _measure_network(
    options: Options, table: Table, network: str, build: Callable[[], torch.nn.Module], cells: list[tuple[str, ...]]
) -> None:
    batch, size = BATCH.get(network, OTHER_BATCH), SIZE
    if options.quick:
        batch, size = QUICK_BATCH, SMALL
    torch.manual_seed(0)
    model, images = build(), torch.randn(batch, 3, size, size)
    example = images[:2, :, :SMALL, :SMALL]
    fast, report = accelerate(model, example)
    check_gradients(copy.deepcopy(model).double(), copy.deepcopy(fast).double(), example.double())
    models = dict(zip(CONTENDERS, (model, fast, without_norm(model)), strict=True))
    gc.collect()
    for task, layout, precision in cells:
        memory = torch.channels_last if layout == "channels-last" else torch.contiguous_format
        x = images.contiguous(memory_format=memory)
        calls: dict[str, Callable[[], object]] = {
            name: _CALLS[task](copy.deepcopy(m).to(memory_format=memory), x, precision) for name, m in models.items()
        }
        where: Row = dict(zip(KEY, (network, task, layout, precision), strict=True))
        where |= {"batch": batch, "size": size, "threads": options.threads}
        where |= {"layers": len(report.changed), "fused": len(report.fused or {})}
        settings = {name: functools.partial(records.set_allocator, name) for name in ALLOCATORS[task]}
        seconds = options.seconds * len(settings)
        times = in_rounds(calls, settings, 2 * seconds, least=2 if options.quick else 5)
        rows = [
            {**where, "allocator": allocator, "round": i, **row}
            for allocator, rounds in times.items()
            for i, row in enumerate(rounds)
        ]
        table.append(rows)  # whole cells, so that a run that is interrupted measures the last one anew
        faster, low, high = speedup(times[KEPT], CPU)
        print(f"{', '.join(where[k] for k in KEY)}: {faster:.2f}× ({low:.2f} to {high:.2f})", flush=True)


# Statistics of a cell's rounds ----------------------------------------------------------------------------------------


def milliseconds(rows: Iterable[Row], kind: str) -> np.ndarray:
    """Return the times of all contenders `[rounds, contenders]`: `ELAPSED`, or `CPU` time of all threads."""
    return np.array([[float(r[f"{name}_{kind}"]) for name in CONTENDERS] for r in rows])


def speedup(rows: Iterable[Row], kind: str) -> tuple[float, float, float]:
    """Return torch's time over the accelerated network's, the median over rounds, and its 95 % interval."""
    times = milliseconds(rows, kind)
    return with_interval(lambda ratios: np.median(ratios, axis=-1), times[:, 0] / times[:, 1])


def share_of_norm(rows: Iterable[Row], kind: str) -> tuple[float, float]:
    """Return the share of normalization and what is fused with it in the time of torch's and of our network.

    Each is the median over rounds of (time − time without normalization) / time.
    """
    times = milliseconds(rows, kind)
    torchs, ours = np.median((times[:, :2] - times[:, 2:]) / times[:, :2], axis=0)
    return float(torchs), float(ours)


def share_of_gain(rows: Iterable[Row], kind: str) -> tuple[float, float, float] | None:
    """Return (torch − ours) / (torch − none), and its 95 % interval; None if torch − none may be zero.

    Each term is the median of the differences within a round.
    """
    times = milliseconds(rows, kind)
    differences = times[:, :1] - times[:, 1:]
    _, low, _ = with_interval(lambda d: np.median(d[..., 1], axis=-1), differences)
    if low <= 0:
        return None

    def ratio(differences: np.ndarray) -> np.ndarray:
        medians = np.median(differences, axis=-2)
        return medians[..., 0] / medians[..., 1]

    return with_interval(ratio, differences)


def speedup_between(before: Iterable[Row], after: Iterable[Row], name: str, kind: str) -> tuple[float, float, float]:
    """Return torch's time in some rounds over a contender's in others, and its 95 % interval.

    Args:
        before: Rounds with one allocator setting.
        after: The same rounds with another one.
        name: The contender.
        kind: `ELAPSED` or `CPU`.
    """
    first = milliseconds(before, kind)[:, CONTENDERS.index(TORCH)]
    second = milliseconds(after, kind)[:, CONTENDERS.index(name)]
    return with_interval(lambda ratios: np.median(ratios, axis=-1), first / second)
