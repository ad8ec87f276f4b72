"""Small and unrepresentative batches: batch normalization against its variants on MNIST.

    python experiments/batch_size.py --data-dir FOLDER

There are two claims. Ioffe (2017): with small batches, and with batches of few classes, batch renormalization is more
accurate than batch normalization. Wu & He (2018): with very small batches, group normalization is more accurate.

The network has three convolutions of 8, 16 and 32 channels, each normalized and followed by ReLU, and a linear layer.
It trains on 12,800 of the 60,000 images once, by plain SGD, and is tested on all 10,000 test images. Every network sees
the same number of images, so a batch size of 1 takes 128 times as many steps as a batch size of 128. The learning rate
is proportional to the batch size (the linear scaling rule): 0.1 at 32 samples for every layer, tuned for none. To first
order, the momentum of the running statistics is also proportional to it, so they average over the same number of
images. Batch renormalization uses the paper's schedule, scaled to the length of training: plain batch normalization for
the first eighth, then d grows to 5 at five eighths and r to 3 at the end. Networks of one seed have the same initial
values and the same batches in the same order.

Seen: the layer is half a point above batch normalization, which is about a tenth of its errors. The decisive effect is
batch renormalization with batches of 4, the smallest in its paper. (Three of the five seeds had been trained when these
thresholds were written down.)

Synchronized batch normalization trains on two processes, each with half of the batch. At 4 and 8 samples this takes
minutes and runs only with `--full`. Some cells do not exist: two processes need two samples; a batch of one sample has
one class, however it is drawn; and a batch that is a single ghost batch is plain batch normalization.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.figure import Figure
from network import small_cnn, test, train
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import (
    BatchNorm2d,
    BatchRenorm2d,
    GhostBatchNorm2d,
    PaperSchedule,
    SyncBatchNorm,
    momentum_per_microbatch,
)
from batchnorm.compare import Data
from batchnorm.compare.inputs.sampling import Sampling

SIZES = (1, 2, 4, 8, 32, 128)
SAMPLINGS = {"iid": "independent batches", "classes:2": "batches of two classes"}
IMAGES = 12_800  # that each network sees
RATE = 0.1  # at 32 samples
MOMENTUM = 0.1  # at 128 samples
GHOST = 8
PROCESSES = 2  # that share a batch of synchronized batch normalization
KINDS = {
    "none": "no normalization",
    "batch": "BatchNorm",
    "renorm": "BatchRenorm",
    "ghost": f"GhostBatchNorm of {GHOST}",
    "group": "GroupNorm",
    "sync": f"SyncBatchNorm, {PROCESSES} processes",
}
# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = {
    "none": "#777777",
    "batch": "#0072B2",
    "renorm": "#D55E00",
    "ghost": "#56B4E9",
    "group": "#009E73",
    "sync": "#CC79A7",
}
MARKERS = {"none": "x", "batch": "o", "renorm": "s", "ghost": "v", "group": "D", "sync": "^"}
WORTH = 0.5


def cells(size: Size) -> Iterator[Cell]:
    """Yield every layer at every batch size and with both samplings, without combinations that are equal to another."""
    together = PROCESSES if size.full else 2 * SIZES[-1] if size.quick else 32  # smallest batch for several processes
    images = IMAGES // 10 if size.quick else IMAGES
    for batch_size in (128,) if size.quick else reversed(SIZES):
        for seed in range(size.seeds):
            for sampling in SAMPLINGS:
                least = dict.fromkeys(KINDS, 1 if sampling == "iid" else 2)
                least |= {"ghost": GHOST + 1, "sync": together}
                for kind in KINDS:
                    if batch_size >= least[kind]:
                        cell = {"kind": kind, "batch_size": batch_size, "sampling": sampling, "seed": seed}
                        yield {**cell, "images": images}


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network."""
    (images,) = data.values()
    size, steps = cell["batch_size"], cell["images"] // cell["batch_size"]
    network = small_cnn(_norm(cell["kind"], size, steps), images, bias=cell["kind"] in ("none", "group"))
    order = list(islice(Sampling.parse(cell["sampling"]).batches(images.y_train, size, cell["seed"]), steps))
    rate = RATE * size / 32
    if cell["kind"] == "sync":
        drawn = torch.cat(order)
        diverged_at = _train_together(network, rate, images.x_train[drawn], images.y_train[drawn], size)
    else:
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        diverged_at = train(network, optimizer, images.x_train, images.y_train, order)
    accuracy, loss = test(network, images.x_test, images.y_test)
    finite = torch.tensor(loss).isfinite()
    return {
        "rate": rate,
        "accuracy": accuracy,
        "loss": loss if finite else None,
        "diverged_at": diverged_at,
    }


def _norm(kind: str, size: int, steps: int) -> Callable[[int], nn.Module]:
    if kind in ("none", "group"):
        return lambda channels: nn.GroupNorm(4, channels) if kind == "group" else nn.Identity()
    options: dict[str, Any] = {"momentum": momentum_per_microbatch(MOMENTUM, SIZES[-1] // size)}
    if kind == "renorm":
        paper = PaperSchedule(steps // 8, rmax_end=steps, dmax_end=steps * 5 // 8)
        options |= {"rmax": paper.rmax, "dmax": paper.dmax}
    if kind == "ghost":
        options["ghost_size"] = GHOST
    layers = {"batch": BatchNorm2d, "renorm": BatchRenorm2d, "ghost": GhostBatchNorm2d, "sync": SyncBatchNorm}
    return lambda channels: layers[kind](channels, **options)


def _train_together(network: nn.Module, rate: float, x: Tensor, y: Tensor, size: int) -> int | None:
    """Train on several processes; x and y are the samples in the order of training, `size` samples per batch."""
    network.share_memory()
    diverged_at = torch.zeros((), dtype=torch.int64).share_memory_()
    with tempfile.TemporaryDirectory() as folder:
        given = (str(Path(folder) / "store"), network, rate, x, y, size, diverged_at)
        multiprocessing.spawn(_train_share, given, PROCESSES)
    return int(diverged_at) or None


def _train_share(
    rank: int, store: str, network: nn.Module, rate: float, x: Tensor, y: Tensor, size: int, diverged_at: Tensor
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    own = copy.deepcopy(network)  # `network` is in shared memory
    shares = [batch.tensor_split(PROCESSES)[rank] for batch in torch.arange(len(x)).split(size)]
    optimizer = torch.optim.SGD(own.parameters(), lr=rate)
    found = train(DistributedDataParallel(own), optimizer, x, y, shares)
    if rank == 0:
        network.load_state_dict(own.state_dict())
        diverged_at.fill_(found or 0)
    distributed.destroy_process_group()


def accuracies(records: Sequence[Record], sampling: str, kind: str, size: int) -> list[float]:
    """Return the accuracy in percent, by seed; none if the cell was not trained."""
    return [100 * value for value in by_seed(records, "accuracy", sampling=sampling, kind=kind, batch_size=size)]


def above(records: Sequence[Record], sampling: str, kind: str, size: int) -> list[float]:
    """Return the accuracy of a layer minus that of batch normalization in points, by seed."""
    pairs = zip(*(accuracies(records, sampling, each, size) for each in (kind, "batch")), strict=True)
    return [a - b for a, b in pairs]


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the difference of each layer from batch normalization in the settings of its paper that were trained."""
    claims = (
        ("BatchRenorm above BatchNorm at 4 samples", "iid", "renorm", 4),
        ("BatchRenorm above BatchNorm at one sample", "iid", "renorm", 1),
        ("BatchRenorm above BatchNorm in batches of two classes, 32 samples", "classes:2", "renorm", 32),
        ("BatchRenorm above BatchNorm in batches of two classes, 128 samples", "classes:2", "renorm", 128),
        ("GroupNorm above BatchNorm at one sample", "iid", "group", 1),
        ("GroupNorm above BatchNorm at 2 samples", "iid", "group", 2),
        ("GroupNorm above BatchNorm at 4 samples", "iid", "group", 4),
    )
    found = [(what, above(records, *where)) for what, *where in claims if accuracies(records, *where)]
    return [Effect.over(what, values, unit="points", worth=WORTH) for what, values in found]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def row(sampling: str, size: int) -> str:
        kinds = ("batch", "renorm", "group", "none")
        return ", ".join(
            f"{mean(accuracies(records, sampling, kind, size)):.1f} % with {KINDS[kind]}"
            if kind != "none"
            else f"{mean(accuracies(records, sampling, kind, size)):.1f} % without normalization"
            for kind in kinds
            if accuracies(records, sampling, kind, size)
        )

    sizes = sorted({record["batch_size"] for record in records})
    small = next(size for size in (4, *sizes) if size in sizes)
    largest = sizes[-1]
    main_effects = [effect for effect in effects if effect is effects[0] or effect.what.endswith("one sample")]
    return (
        f"Test accuracy with independent batches of {sizes[0]}: {row('iid', sizes[0])}. With batches of {small}: "
        f"{row('iid', small)}. With batches of {largest}: {row('iid', largest)}. With batches of {largest} from two "
        f"classes each: {row('classes:2', largest)}. "
        f"Paired by seed: {'; '.join(f'{effect.what}, {effect.figures}' for effect in main_effects)}."
    )


def table(records: Sequence[Record]) -> str:
    """Return the effects, the accuracies, and their differences from batch normalization as Markdown."""
    lines = ["| difference from batch normalization | mean over seeds, 95 % interval | verdict |", "|---|---|---|"]
    lines += [f"| {effect.what} | {effect.figures} | {effect.verdict} |" for effect in effects(records)]
    lines.append("")
    seeds = len({record["seed"] for record in records})
    for sampling, title in SAMPLINGS.items():
        for what, values in (("Test accuracy in percent", accuracies), ("Points above `BatchNorm`", above)):
            lines += [f"{what}, {title}, mean ± standard deviation over {seeds} seeds:", ""]
            lines += [f"| batch size | {' | '.join(map(str, SIZES))} |", "|---" * (1 + len(SIZES)) + "|"]
            for kind, name in KINDS.items():
                if kind == "batch" and values is above:
                    continue
                shown = [
                    spread(values(records, sampling, kind, size), "+" if values is above else "")
                    if accuracies(records, sampling, kind, size)
                    else "–"
                    for size in SIZES
                ]
                lines.append(f"| {name} | {' | '.join(shown)} |")
            lines.append("")
    return "\n".join(lines)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean and standard deviation over the seeds."""
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}".replace("-", "−")


def draw(records: Sequence[Record]) -> Figure:
    """Draw mean and standard deviation over the seeds against batch size."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, (sampling, title) in zip(panels, SAMPLINGS.items(), strict=True):
        for place, (kind, name) in enumerate(KINDS.items()):
            rows = {size: values for size in SIZES if (values := accuracies(records, sampling, kind, size))}
            panel.errorbar(
                [size * 1.03 ** (place - 2.5) for size in rows],  # side by side, so that all are visible
                [100 - mean(values) for values in rows.values()],
                [stdev(values) for values in rows.values()],
                label=name,
                color=COLOURS[kind],
                marker=MARKERS[kind],
                markersize=6,
                linestyle="--" if kind == "none" else "-",
                capsize=3,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.set(title=f"{title[0].upper()}{title[1:]}", xlabel="batch size (samples)")
        panel.grid(alpha=0.3)
    # A logarithmic axis of the errors, so that the range from 90 to 97 % is not flat.
    ticks = (97, 95, 90, 80, 60, 20)
    panels[0].set_yscale("log")
    panels[0].set_yticks([100 - tick for tick in ticks], [str(tick) for tick in ticks])
    panels[0].invert_yaxis()
    panels[0].set_ylabel("accuracy on the 10,000 test images (%)")
    panels[0].legend(loc="lower left", frameon=False)
    for panel in panels:
        panel.minorticks_off()
    figure.suptitle("Which normalization works with small and with unrepresentative batches?")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="batch_size",
        title="Small batches, and batches of few classes",
        statement=(
            "In small batches, and in batches of few classes, batch renormalization is more accurate than batch "
            "normalization; in very small batches, group normalization is more accurate."
        ),
        source="[Ioffe 2017](https://arxiv.org/abs/1702.03275), [Wu & He 2018](https://arxiv.org/abs/1803.08494)",
        setting=(
            f"Three normalized convolutions on MNIST; {IMAGES:,} images once, in batches of 1 to 128, independent or "
            "from two classes each; plain SGD at a rate proportional to the batch size; five seeds."
        ),
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
