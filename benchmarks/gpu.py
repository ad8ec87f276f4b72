"""`python -m benchmarks gpu`: layers and a training step on a GPU, against torch and the floor."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.ops.triton import plan
from benchmarks import cases, networks, records
from benchmarks.gpu_network import ResNet50
from benchmarks.gpu_timing import Call, Clock, DeviceClock, HostClock, bandwidth

# Channels and positions of ResNet-50's layers at 224×224.
LAYERS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
BATCHES = (32, 256)
EPS = 1e-5
OURS, TORCH, NATIVE, COMPILED = "batchnorm", "torch", "torch without cuDNN", "torch.compile"
KEY = ("device", "shape", "layout", "dtype", "task", "contender")
# Seconds after which the slowest peer is left out, and after which layers are: all stays under eight minutes.
PATIENCE, LIMIT = 240.0, 400.0

Forward = Callable[[Tensor, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step of batch normalization and ReLU, with or without an addition."""

    shape: tuple[int, int, int, int]
    layout: str
    dtype: str
    residual: bool

    @property
    def task(self) -> str:
        return "BN+add+ReLU" if self.residual else "BN+ReLU"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * cases.DTYPES[self.dtype].itemsize

    def passes(self, registers: int, cache: int) -> int:
        """Traffic of forward and backward in tensors of x's size, on a device with so many bytes on the chip.

        What decides normalization is read once where a channel fits one multiprocessor's registers (contiguous), or
        where the tensors fit the cache; else twice.
        """
        found = (2 + self.residual) + (3 + 2 * self.residual)
        for reads in (1, 2 + self.residual):  # x forward; x, dy and y backward
            channel = self.nbytes // self.shape[1] if self.layout == "contiguous" else math.inf
            if reads * channel > registers and (reads + 1) * self.nbytes > cache:
                found += reads
        return found

    def data(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
        """x, the residual and dy."""
        make = lambda: cases.in_layout(torch.randn(self.shape, device=device), self.layout)  # noqa: E731
        kind = cases.DTYPES[self.dtype]
        return make().to(kind), make().to(kind) if self.residual else None, make().to(kind)


def all_cases(dry: bool) -> list[Case]:
    """Every case, or one of each kind that is small."""
    shapes = [(4, 8, 6, 6)] if dry else [(n, c, s, s) for n in BATCHES for c, s in LAYERS]
    return [Case(*point) for point in itertools.product(shapes, cases.LAYOUTS, cases.DTYPES, (False, True))]


def _ours(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    layer = batchnorm.BatchNormAct2d(channels, eps=EPS, activation="relu", device=device)
    return layer, layer


def _torch(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    layer = nn.BatchNorm2d(channels, eps=EPS, device=device)
    return layer, lambda x, residual: F.relu(layer(x) if residual is None else layer(x) + residual)


def _compiled(channels: int, device: torch.device) -> tuple[nn.Module, Forward]:
    torch._dynamo.reset()
    layer, forward = _torch(channels, device)
    return layer, torch.compile(forward, dynamic=False)


CONTENDERS = {OURS: _ours, TORCH: _torch, NATIVE: _torch, COMPILED: _compiled}


@contextlib.contextmanager
def _settings_of(contender: str) -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=contender != NATIVE):
        yield


def step(layer: nn.Module, forward: Forward, x: Tensor, residual: Tensor | None, dy: Tensor) -> Call:
    """A call that computes y and all gradients once."""
    inputs = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    wanted = [*inputs, *layer.parameters()]

    def call() -> tuple[Tensor, ...]:
        y = forward(inputs[0], inputs[1] if len(inputs) > 1 else None)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy))

    return call


def wrong_by(case: Case, device: torch.device) -> float:
    """The largest error of our step, as a share of the largest value, against float64 on the same device."""
    x, residual, dy = case.data(device)
    results = []
    for wide in (False, True):
        layer, forward = (_torch if wide else _ours)(case.shape[1], device)
        layer = layer.double() if wide else layer
        given = (t if t is None or not wide else t.double() for t in (x, residual, dy))
        results.append(step(layer, forward, *given)())
    near_kink = results[1][0] < (1e-3 if case.dtype == "float32" else 5e-2)
    found = 0.0
    for i, (ours, reference) in enumerate(zip(*results, strict=True)):
        difference = (ours.double() - reference).abs()
        if 0 < i <= 1 + case.residual:  # dx and the residual's gradient, where rounding decides the mask
            difference = difference.masked_fill(near_kink, 0.0)
        if i <= 1 + case.residual:
            found = max(found, float(difference.max() / reference.abs().max()))
    return found


def measure(case: Case, clock: Clock, contenders: list[str], speed: float, repeats: int) -> list[records.Row]:
    """Rows of one case, every contender over the same inputs, which rotate where they would stay in the cache."""
    cache, traffic = clock.cache_bytes(), case.nbytes * (3 if case.residual else 2)
    sets = [case.data(clock.device) for _ in range(min(max(1, 2 * cache // traffic + 1), 32))]
    passes = case.passes(clock.register_bytes(), cache)
    floor = passes * case.nbytes / speed
    rows: list[records.Row] = []
    for contender in contenders:
        with _settings_of(contender):
            layer, forward = CONTENDERS[contender](case.shape[1], clock.device)
            calls = [step(layer, forward, *data) for data in sets]
            captured = clock.seconds(calls, repeats=repeats, captured=True)
            launched = clock.seconds(calls, repeats=repeats, captured=False)
            peak = clock.peak_bytes(calls[0])
        rows.append(
            {
                "device": clock.name(),
                "shape": cases.shape_text(case.shape),
                "layout": case.layout,
                "dtype": case.dtype,
                "task": case.task,
                "contender": contender,
                "ms": captured * 1e3,
                "ms_launched": launched * 1e3,
                "floor_ms": floor * 1e3,
                "share_of_floor": floor / captured,
                "passes": passes,
                "peak_bytes": peak,
                "bytes": case.nbytes,
                "beyond_cache": case.nbytes > cache,
                "copy_gb_per_s": speed / 1e9,
            }
        )
    return rows


def measure_network(clock: Clock, dry: bool, repeats: int) -> list[records.Row]:
    """A training step of ResNet-50, channels-last and under bfloat16 autocast, with our layers and with torch's."""
    shape, size = ((2, 3, 32, 32), {"depths": (1, 1), "width": 4}) if dry else ((64, 3, 224, 224), {})
    rows: list[records.Row] = []
    for contender, norm in ((OURS, networks.our_norm), (TORCH, networks.torch_norm)):
        model = ResNet50(norm, **size).to(clock.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)
        images = torch.randn(shape, device=clock.device).to(memory_format=torch.channels_last)
        labels = torch.zeros(shape[0], dtype=torch.int64, device=clock.device)

        def call(model=model, optimizer=optimizer, images=images, labels=labels) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast(clock.device.type, torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        rows.append(
            {
                "device": clock.name(),
                "shape": cases.shape_text(shape),
                "layout": "channels-last",
                "dtype": "bfloat16",
                "task": "ResNet-50 training step",
                "contender": contender,
                "ms_launched": clock.seconds([call], repeats=repeats, captured=False) * 1e3,
                "peak_bytes": clock.peak_bytes(call),
            }
        )
    return rows


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def summary(rows: list[records.Row]) -> str:
    """A short table: our share of the floor, and each peer's time divided by ours (geometric mean and least)."""
    lines = [f"{'task':12} {'layout':14} {'dtype':9} {'of floor':>8}  peer's time / ours: mean (least)"]
    layers = [r for r in rows if "floor_ms" in r]
    for task, layout, dtype in sorted({(r["task"], r["layout"], r["dtype"]) for r in layers}):
        group = [r for r in layers if (r["task"], r["layout"], r["dtype"]) == (task, layout, dtype)]
        ours = {r["shape"]: r for r in group if r["contender"] == OURS}
        large = [r["share_of_floor"] for r in ours.values() if r["beyond_cache"]]
        peers = []
        for name in CONTENDERS:
            ratios = [r["ms"] / ours[r["shape"]]["ms"] for r in group if r["contender"] == name and r["shape"] in ours]
            if name != OURS and ratios:
                peers.append(f"{name} {geometric_mean(ratios):.2f} ({min(ratios):.2f})")
        share = f"{100 * geometric_mean(large):.0f} %" if large else "-"
        lines.append(f"{task:12} {layout:14} {dtype:9} {share:>8}  {'; '.join(peers)}")
    network = {r["contender"]: r for r in rows if "floor_ms" not in r}
    if len(network) == 2:
        ratio = network[TORCH]["ms_launched"] / network[OURS]["ms_launched"]
        memory = network[OURS]["peak_bytes"] / max(network[TORCH]["peak_bytes"], 1)
        lines.append(
            f"ResNet-50 training step: torch's time / ours {ratio:.2f}; our peak memory {memory:.2f} of torch's"
        )
    return "\n".join(lines)


def tune(clock: Clock, dry: bool) -> None:
    """Print our mean time for every candidate of the table of settings, one field at a time."""
    chosen, before = all_cases(dry), plan.SETTINGS
    chosen = [c for c in chosen if not c.residual and c.shape[0] == chosen[-1].shape[0]]
    for field, candidates in plan.CANDIDATES.items():
        for value in candidates:
            plan.SETTINGS = dataclasses.replace(before, **{field: value})
            try:
                ms = [measure(case, clock, [OURS], 1e12, 3)[0]["ms"] for case in chosen]
            finally:
                plan.SETTINGS = before
            print(f"{field:10} {value:6} {geometric_mean(ms):.4f} ms" + " (now)" * (value == getattr(before, field)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results", help="For gpu.csv.")
@click.option("--tune", "tuning", is_flag=True, help="Compare candidates for the kernels' table of settings instead.")
@click.option("--dry", is_flag=True, help="Without a GPU: only see that everything runs; the figures mean nothing.")
def main(out: Path, tuning: bool, dry: bool) -> None:
    """Measure batch normalization on this machine's GPU: writes gpu.csv, prints a short table, under eight minutes."""
    if not dry and not torch.cuda.is_available():
        raise click.UsageError("torch finds no CUDA device here. With --dry everything runs without one.")
    clock: Clock = HostClock() if dry else DeviceClock(torch.device("cuda", torch.cuda.current_device()))
    if tuning:
        tune(clock, dry)
        return
    start, repeats = time.monotonic(), 2 if dry else 20
    print(f"{clock.name()}; torch {torch.__version__}; {batchnorm.backends()['cuda']}")
    speed = bandwidth(clock, 1 << (12 if dry else 30), repeats)
    print(f"copy: {speed / 1e9:.0f} GB/s")
    table = records.Table(out / "gpu.csv", KEY)
    table.clear()
    rows: list[records.Row] = []
    for case in all_cases(dry):
        what = f"{cases.shape_text(case.shape)} {case.layout} {case.dtype} {case.task}"
        if case.shape[0] == BATCHES[0] or dry:
            error = wrong_by(case, clock.device)
            if not error <= cases.TOLERANCE[case.dtype]:
                raise SystemExit(f"{what}: ours is off by {error:.2g} of the largest value; nothing is reported.")
        elapsed = time.monotonic() - start
        if elapsed > LIMIT:
            print(f"{what}: left out, and what comes after it, for lack of time")
            break
        late = dry or elapsed > PATIENCE
        names = [n for n in CONTENDERS if n != COMPILED or (case.shape[0] == BATCHES[0] and not late)]
        try:
            found = measure(case, clock, names, speed, repeats)
        except torch.OutOfMemoryError:
            print(f"{what}: left out, the device's memory does not hold it")
            continue
        rows += found
        table.append(found)
    network = measure_network(clock, dry, repeats)
    table.append([{k: r.get(k, "") for k in rows[0]} for r in network])
    table.finish()
    print(summary(rows + network))
    print(f"results: {table.path}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
