"""Accuracy against batch size, with independent batches and with batches of two classes each, on all of MNIST.

    python experiments/batch_size.py --data-dir FOLDER --out cells.jsonl
    torchrun --nproc-per-node 2 experiments/batch_size.py --data-dir FOLDER --out cells.jsonl
    python experiments/batch_size.py --draw --out cells.jsonl --picture docs/images/batch-size.png

FOLDER holds the four files of MNIST, gzipped. The second command adds what trains on two processes. What stands in
`cells.jsonl` is not trained again. The third prints the tables in Markdown and draws the picture.

Every network sees the same number of images, so a batch of 1 takes 128 times as many steps as one of 128. The learning
rate is proportional to the batch size (the linear scaling rule), and so is, to first order, the momentum of the running
statistics: they average over as many images.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from batchnorm import PaperSchedule, momentum_per_microbatch
from batchnorm.compare import Data, from_arrays, models, parallel
from batchnorm.compare.measurements import FirstActivation
from batchnorm.compare.norms import Norm, parse
from batchnorm.compare.records import Recorder, Run
from batchnorm.compare.sampling import Sampling
from batchnorm.compare.training import OPTIMIZERS, Schedule, train

SIZES = (1, 2, 4, 8, 32, 128)
SAMPLINGS = {"iid": "independent batches", "classes:2": "batches of two classes"}
SEEDS = 3
IMAGES = 12_800  # that each network sees
RATE = 0.1  # at 32 samples
MOMENTUM = 0.1  # at 128 samples
GHOST = 8
# Key in the records: name, and number of processes that train it.
KINDS = {
    "none": ("no normalization", 1),
    "batch": ("BatchNorm", 1),
    "renorm": ("BatchRenorm", 1),
    "ghost": (f"GhostBatchNorm of {GHOST}", 1),
    "group": ("GroupNorm", 1),
    "sync": ("SyncBatchNorm, 2 processes", 2),
}
# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = {
    "none": "#777777",
    "batch": "#0072B2",
    "renorm": "#D55E00",
    "ghost": "#56B4E9",
    "group": "#009E73",
    "sync": "#CC79A7",
}
MARKERS = {"none": "x", "batch": "o", "renorm": "s", "ghost": "v", "group": "D", "sync": "^"}
KEYS = ("kind", "batch_size", "sampling", "seed")
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One network to train."""

    kind: str
    batch_size: int
    sampling: str
    seed: int

    @property
    def steps(self) -> int:
        """How many steps show it all images."""
        return IMAGES // self.batch_size

    @property
    def rate(self) -> float:
        """Learning rate."""
        return RATE * self.batch_size / 32

    @property
    def norm(self) -> Norm:
        """What its network is built with."""
        momentum = momentum_per_microbatch(MOMENTUM, SIZES[-1] // self.batch_size)
        if self.kind in ("none", "group"):
            return parse("group:4" if self.kind == "group" else "none")
        norm = parse(f"{self.kind}:{GHOST}" if self.kind == "ghost" else self.kind)
        norm.options["momentum"] = momentum
        if self.kind == "renorm":
            paper = PaperSchedule(self.steps // 8, rmax_end=self.steps, dmax_end=self.steps * 5 // 8)
            norm.options |= {"rmax": paper.rmax, "dmax": paper.dmax}
        return norm


def cells(processes: int) -> Iterator[Cell]:
    """All that so many processes train together.

    Two processes need two samples, a batch of one sample is of one class whatever the sampling, and a batch
    that is one ghost batch is batch normalization's.
    """
    for size in reversed(SIZES):
        for seed in range(SEEDS):
            for sampling in SAMPLINGS:
                for kind, (_, needed) in KINDS.items():
                    least = max(needed, 1 if sampling == "iid" else 2, GHOST + 1 if kind == "ghost" else 1)
                    if needed == processes and size >= least:
                        yield Cell(kind, size, sampling, seed)


def network(norm: Norm, in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Three convolutions, each normalized, and a linear layer."""

    def convolution(before: int, after: int, stride: int) -> list[nn.Module]:
        bias = not norm.replaces_bias
        return [nn.Conv2d(before, after, 3, stride, 1, bias=bias), norm(after, dims=2), nn.ReLU()]

    return nn.Sequential(
        *convolution(in_shape[0], 8, 1),
        *convolution(8, 16, 2),
        *convolution(16, 32, 2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 9, num_classes),
    )


def measure(cell: Cell, data: Data, processes: parallel.Processes) -> Record:
    """Trains one network with the comparison's own function, and returns what came out."""
    sample, norm = data.x_train[:64], cell.norm
    torch.manual_seed(cell.seed)
    model = models.resolve(network)(norm, sample, data.num_classes)
    run = Run(norm.spec, cell.seed, sum(p.numel() for p in model.parameters()), None, [], [])
    schedule = Schedule(cell.steps, cell.batch_size, cell.steps, Sampling.parse(cell.sampling))
    optimizer = OPTIMIZERS["sgd"].build(model.parameters(), lr=cell.rate)
    watched = FirstActivation(model, norm, sample)
    train(model, norm, data, optimizer, schedule, watched, Recorder(run, io.StringIO()), lambda *_: None, processes)
    found = run.evaluations[-1] if processes.first else None
    return {
        **asdict(cell),
        "images": IMAGES,
        "rate": cell.rate,
        "accuracy": found and found.test_accuracy,
        "loss": found and found.test_loss,
        "seconds": run.steps[-1].train_seconds,
        "diverged_at": run.diverged_at,
    }


def load(folder: Path) -> Data:
    """MNIST, all of it."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=offset)

    arrays = {}
    for key, name in (("train", "train"), ("test", "t10k")):
        arrays[f"x_{key}"] = read(f"{name}-images-idx3", 16).reshape(-1, 28, 28)
        arrays[f"y_{key}"] = read(f"{name}-labels-idx1", 8)
    return from_arrays(arrays, "MNIST")


def done(out: Path) -> list[Record]:
    """The records so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def run(folder: Path, out: Path) -> None:
    """Trains what is missing, and adds each record when it is there."""
    torch.set_num_threads(1)
    data = load(folder)
    with parallel.processes() as processes:
        finished = processes.from_first([Cell(**{key: record[key] for key in KEYS}) for record in done(out)])
        for cell in cells(processes.size):
            if cell in finished:
                continue
            record = measure(cell, data, processes)
            if processes.first:
                with out.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)


def accuracies(records: list[Record]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Accuracy in percent of each seed, by batch size, for each sampling and kind."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: (record["batch_size"], record["seed"])):
        found[record["sampling"], record["kind"]][record["batch_size"]].append(100 * record["accuracy"])
    return found


def spread(values: list[float], sign: str = "") -> str:
    """Mean and standard deviation over the seeds, with the number of seeds where some are missing."""
    if not values:
        return "–"
    text = f"{mean(values):{sign}.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
    return text if len(values) == SEEDS else f"{text} ({len(values)})"


def print_tables(records: list[Record]) -> None:
    """Prints accuracy, and how much more each has than BatchNorm, seed by seed."""
    found = accuracies(records)
    for sampling, title in SAMPLINGS.items():
        for what in ("test accuracy (%)", "points above BatchNorm"):
            print(f"\n{title}, {what}\n")
            print("| batch size |", " | ".join(map(str, SIZES)), "|\n|---|" + "---|" * len(SIZES))
            for kind, (name, _) in KINDS.items():
                row, against = found[sampling, kind], found[sampling, "batch"]
                if kind == "batch" and what.startswith("points"):
                    continue
                if what.startswith("points"):
                    pairs = {size: zip(values, against[size], strict=False) for size, values in row.items()}
                    shown = {size: spread([a - b for a, b in pair], "+") for size, pair in pairs.items()}
                else:
                    shown = {size: spread(values) for size, values in row.items()}
                print(f"| {name} |", " | ".join(shown.get(size, "–") for size in SIZES), "|")


def draw(records: list[Record], picture: Path) -> None:
    """Draws mean and standard deviation over the seeds against batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = accuracies(records)
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for panel, (sampling, title) in zip(panels, SAMPLINGS.items(), strict=True):
        for place, (kind, (name, _)) in enumerate(KINDS.items()):
            row = found[sampling, kind]
            sizes = [size * 1.03 ** (place - 2.5) for size in row]  # side by side, so that none hides another
            spreads = [stdev(values) if len(values) > 1 else 0.0 for values in row.values()]
            panel.errorbar(
                sizes,
                [100 - mean(values) for values in row.values()],
                spreads,
                label=name,
                color=COLOURS[kind],
                marker=MARKERS[kind],
                markersize=6,
                linestyle="--" if kind == "none" else "-",
                capsize=3,
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(SIZES, [str(size) for size in SIZES])
        panel.set(title=title[0].upper() + title[1:], xlabel="batch size (samples)")
        panel.grid(alpha=0.3)
    # Equal distances are equal ratios of errors: what lies between 90 and 97 % would be flat otherwise.
    ticks = (97, 95, 90, 80, 60, 20)
    panels[0].set_yscale("log")
    panels[0].set_yticks([100 - tick for tick in ticks], [str(tick) for tick in ticks])
    panels[0].invert_yaxis()
    panels[0].set_ylabel("accuracy on the 10,000 test images (%)")
    panels[0].legend(loc="lower left", frameon=False)
    for panel in panels:
        panel.minorticks_off()
    figure.savefig(picture, dpi=110)


def main() -> None:
    """Trains, or draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--out", type=Path, required=True, help="where the records stand, one JSON object to a line")
    parser.add_argument("--draw", action="store_true", help="print tables of what is there instead of training")
    parser.add_argument("--picture", type=Path, help="draw them too, into this file")
    given = parser.parse_args()
    if given.draw:
        records = done(given.out)
        print_tables(records)
        if given.picture:
            draw(records, given.picture)
    elif given.data_dir is None:
        parser.error("training needs --data-dir")
    else:
        run(given.data_dir, given.out)


if __name__ == "__main__":
    main()
