"""Training steps of whole networks with our normalization, torch's and none, in alternation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.networks import NETWORKS, NORMS, Norm, same_weights
from benchmarks.options import Options
from benchmarks.records import Row, Table
from benchmarks.timing import in_rounds, with_interval

KEY = ("allocator", "network", "layout", "precision", "round")
BATCH, SIZE = 32, 160
VARIANTS = (("contiguous", "float32"), ("channels-last", "float32"), ("channels-last", "bfloat16 autocast"))


def _check_agreement(build: Callable[[Norm], torch.nn.Module]) -> None:
    """Raise unless loss and every gradient are the same with ours and torch's, in float64."""
    torch.manual_seed(0)
    torchs, ours = build(NORMS["torch"]).double(), build(NORMS["batchnorm"]).double()
    same_weights(ours, torchs)
    check_gradients(torchs, ours)


def check_gradients(torchs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Raise unless every gradient of two networks in float64 is the same."""
    images, labels = torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.arange(4)
    gradients = []
    for model in (torchs, ours):
        torch.manual_seed(0)  # dropout
        F.cross_entropy(model(images), labels).backward()
        gradients.append([p.grad for p in model.parameters()])
    largest = max(float(g.abs().max()) for g in gradients[0])  # some gradients are only rounding: β before another BN
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) / largest
    if not difference < 1e-9:
        raise RuntimeError(f"the networks must have the same gradients in float64; they differ by {difference:.1e}")


def training_step(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, precision: str = "float32"
) -> Callable[[], None]:
    """Return a call that takes one step of plain gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision != "float32" else contextlib.nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def measure_steps(options: Options, table: Table) -> None:
    """Write one row for each alternation."""
    done = table.measured()
    batch, size, rounds = (4, 64, 2) if options.quick else (BATCH, SIZE, options.rounds)
    for network, build in NETWORKS.items():
        _check_agreement(build)
        for layout, precision in VARIANTS:
            where = {"allocator": options.allocator, "network": network, "layout": layout, "precision": precision}
            left = [i for i in range(rounds) if (*where.values(), str(i)) not in done]
            if left:
                _measure(build, where, batch, size, left, table)


def _measure(
    build: Callable[[Norm], torch.nn.Module],
    where: dict[str, str],
    batch: int,
    size: int,
    left: list[int],
    table: Table,
) -> None:
    torch.manual_seed(0)
    memory = torch.channels_last if where["layout"] == "channels-last" else torch.contiguous_format
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=memory)
    labels = torch.randint(1000, (batch,))
    steps = {
        name: training_step(build(norm).to(memory_format=memory), images, labels, where["precision"])
        for name, norm in NORMS.items()
    }
    rows: list[Row] = []
    for i, milliseconds in in_rounds(steps, left):
        rows.append(
            {**where, "batch": batch, "size": size, "round": i, "threads": torch.get_num_threads(), **milliseconds}
        )
        table.append(rows[-1:])
    share, low, high = share_of_torch(rows)
    medians = ", ".join(f"{name} {np.median([r[f'{name}_ms'] for r in rows]):.4g}" for name in NORMS)
    print(
        f"{', '.join(where.values())}: {medians} ms; time above no normalization {share:.0%} of torch's "
        f"({low:.0%} to {high:.0%})",
        flush=True,
    )


def share_of_torch(rows: Iterable[Row]) -> tuple[float, float, float]:
    """Return (ours − none) / (torch's − none), and its 95 % interval.

    Each term is the median of the differences within a round; the interval is the percentile bootstrap over rounds.
    """
    times = np.array([[float(r[f"{name}_ms"]) for name in ("batchnorm", "torch", "none")] for r in rows])
    above = times[:, :2] - times[:, 2:]

    def ratio(differences: np.ndarray) -> np.ndarray:
        medians = np.median(differences, axis=-2)
        return medians[..., 0] / medians[..., 1]

    return with_interval(above, ratio)
