"""Noise that regularizes: how batch statistics add noise to a sample, and whether this noise helps large batches.

    python experiments/noise.py --data-dir FOLDER

The claim (Hoffer, Hubara & Soudry 2017): large batches generalize worse than small ones, in part because they lack the
noise that small batches add to the normalization. Statistics of parts of the batch ("ghost batches") restore this
noise. The claim has two parts, tested one after the other.

**The amount of noise.** The input of a layer with its initial values is MNIST. One sample stays, and the rest of its
batch is drawn anew 400 times. The noise is the standard deviation of the sample's normalized activation. For m
independent Gaussian values, theory predicts √((1 + x̂²/2)/m), which is √(1.5/m) over samples with mean x̂² = 1. A batch
drawn without replacement from N_data images has √(1 − m/N_data) of that. In a convolution, m counts pixels.
Neighbouring pixels are similar, so N images count less than N·H·W independent values. Seen: the noise falls fourfold
from 16 to 256 samples.

**Its benefit.** A perceptron (two hidden layers of 128 units, He's initial values) trains on 4,096 images for 30 epochs
by SGD with momentum 0.9: in batches of 32, 128 and 1,024, with and without batch normalization, and at 1,024 with ghost
batches of 16, 32 and 128. All arms of a seed share their initial values, and arms with the same batch size share their
batches. Each arm uses the best of the same five learning rates, which grow with the square root of the batch size as in
the paper. The best rate is chosen by mean accuracy on 5,000 other images of the training set; the results are for the
10,000 test images. (The rate 0.3 was added after the first run had chosen the largest rate, 0.1, for most arms.) A
smaller batch changes the noise of the gradient as well as that of the statistics. Ghost batches change only the noise
of the statistics, and the network without normalization has only the noise of the gradient. Ghost batches are therefore
decisive: the whole batch of 1,024 must give at least a tenth more errors than ghost batches of 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from statistics import mean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from network import test, train
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import BatchNorm1d, GhostBatchNorm1d
from batchnorm.compare import Data
from batchnorm.compare.inputs.sampling import IID

# The amount of noise.
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
WATCHED = 16  # samples whose activations are watched
POPULATION = 2048  # images that batches are drawn from
DRAWS = 400
PIXEL_STEP = 37  # every 37th pixel of an image is watched
WAYS = ("linear", "without replacement", "convolution")
# Its benefit.
IMAGES = 4096
HELD_OUT = 5000
BATCHES = (32, 128, 1024)
LARGE = BATCHES[-1]
GHOSTS = (16, 32, 128)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)  # at a batch of 32
GHOST = 32  # the decisive size
# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = {"batch": "#0072B2", "none": "#777777", "ghost": "#D55E00"}
NAMES = {
    "batch": "BatchNorm, batches of 32 to 1,024",
    "none": "no normalization, batches of 32 to 1,024",
    "ghost": f"batches of {LARGE:,} normalized in parts",
}
MARKERS = {"batch": "o", "none": "x", "ghost": "v"}


def cells(size: Size) -> Iterator[Cell]:
    """Yield the noise for each seed, and each arm at each rate; `group` samples are normalized together."""
    arms = [(kind, batch, batch) for batch in BATCHES for kind in ("batch", "none")]
    arms += [("ghost", LARGE, ghost) for ghost in GHOSTS]
    epochs = 1 if size.quick else 100 if size.full else 30
    for seed in range(size.seeds):
        yield {"kind": "noise", "seed": seed}
        for kind, batch, group in arms:
            for rate in RATES:
                yield {"kind": kind, "batch": batch, "group": group, "rate": rate, "epochs": epochs, "seed": seed}


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Measure the noise, or train one network."""
    (images,) = data.values()
    return _noise(images, cell["seed"]) if cell["kind"] == "noise" else _train(cell, images)


# ---- the amount of noise


def noise(values: Tensor, size: int, *, watched: int, draws: int, replace: bool, generator: torch.Generator) -> Tensor:
    """Return the deviation of samples' normalized values over random draws of the rest of their batch.

    Args:
        values: float64 `[samples, channels, pixels]`, the input of the normalization.
        size: Samples in a batch, including the watched one.
        watched: Number of watched samples, the first ones; the rest of a batch is drawn from the others.
        draws: Number of draws.
        replace: Whether a sample can be drawn twice for one batch.
        generator: The random generator.

    Returns:
        `[watched, channels, pixels]`, of every `PIXEL_STEP`th pixel.
    """
    first, second = values.mean(2), values.square().mean(2)
    others = len(values) - watched
    if replace:
        index = torch.randint(others, (draws, size - 1), generator=generator)
    else:
        index = torch.rand(draws, others, generator=generator).argsort(1)[:, : size - 1]
    rest = [torch.stack([part[watched:][row].sum(0) for row in index]) for part in (first, second)]  # [draws, channels]
    found = []
    for sample in range(watched):
        mu, square = ((total + part[sample]) / size for total, part in zip(rest, (first, second), strict=True))
        sigma = (square - mu.square()).sqrt()
        found.append(((values[sample, :, ::PIXEL_STEP] - mu[:, :, None]) / sigma[:, :, None]).std(0))
    return torch.stack(found)


def _noise(data: Data, seed: int) -> Record:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(data.x_train), generator=generator)[: WATCHED + POPULATION]
    x = data.x_train[index].double()
    linear = F.linear(x.flatten(1), torch.randn(64, x[0].numel(), generator=generator, dtype=x.dtype))
    convolution = F.conv2d(x, torch.randn(8, x.shape[1], 3, 3, generator=generator, dtype=x.dtype), padding=1)
    given = {"linear": linear[:, :, None], "convolution": convolution.flatten(2)}
    given["without replacement"] = given["linear"]
    found: Record = {"pixels": convolution[0, 0].numel()}
    for way in WAYS:
        replace = way != "without replacement"
        values = given[way]
        each = [
            noise(values, size, watched=WATCHED, draws=DRAWS, replace=replace, generator=generator) for size in SIZES
        ]
        found[way] = [deviations.square().mean().sqrt().item() for deviations in each]
        sigma, mu = torch.std_mean(values, (0, 2), keepdim=True)
        normal = (values[:WATCHED, :, ::PIXEL_STEP] - mu) / sigma
        found[f"{way}, x̂²"] = normal.square().mean().item()
    return found


def theory(record: Record, way: str, size: int) -> float:
    """Return the theoretical deviation for independent Gaussian values."""
    values = size * (record["pixels"] if way == "convolution" else 1)
    left = 1 - size / POPULATION if way == "without replacement" else 1.0
    return ((1 + record[f"{way}, x̂²"] / 2) / values * left) ** 0.5


# ---- its benefit


def _train(cell: Cell, data: Data) -> Record:
    norms = {
        "batch": BatchNorm1d,
        "none": lambda _: nn.Identity(),
        "ghost": partial(GhostBatchNorm1d, ghost_size=cell["group"]),
    }
    norm = norms[cell["kind"]]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((data.x_train[0].numel(), 128), (128, 128)):
        linear = nn.Linear(before, after)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        layers += [linear, norm(after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(128, data.num_classes))
    x, y = data.x_train[:IMAGES], data.y_train[:IMAGES]
    held_out = data.x_train[-HELD_OUT:], data.y_train[-HELD_OUT:]
    rate = cell["rate"] * (cell["batch"] / BATCHES[0]) ** 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=0.9)
    order = islice(IID.batches(y, cell["batch"], cell["seed"]), cell["epochs"] * IMAGES // cell["batch"])
    diverged_at = train(network, optimizer, x, y, order)
    found: Record = {"diverged_at": diverged_at}
    for name, (inputs, labels) in {"train": (x, y), "held out": held_out, "test": (data.x_test, data.y_test)}.items():
        found[name] = 100 * test(network, inputs, labels)[0]
    return found


def best(records: Sequence[Record], kind: str, batch: int, group: int) -> list[Record]:
    """Return an arm's records at its best rate, by seed."""
    arm = [r for r in records if r["kind"] == kind and (r["batch"], r["group"]) == (batch, group)]
    rate = max(RATES, key=lambda rate: mean(by_seed(arm, "held out", rate=rate)))
    return sorted((r for r in arm if r["rate"] == rate), key=lambda r: r["seed"])


def errors(records: Sequence[Record], kind: str, batch: int, group: int) -> list[float]:
    """Return an arm's errors on the test images in percent, by seed."""
    return [100 - record["test"] for record in best(records, kind, batch, group)]


def gaps(records: Sequence[Record], kind: str, batch: int, group: int) -> list[float]:
    """Return an arm's training accuracy minus its test accuracy in points, by seed."""
    return [record["train"] - record["test"] for record in best(records, kind, batch, group)]


# ---- the results


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the ratio of errors, the differences of the gap, and the ratios of noise."""
    whole, ghost = errors(records, "batch", LARGE, LARGE), errors(records, "ghost", LARGE, GHOST)
    small = BATCHES[0]
    widening = {
        kind: [
            large - little
            for large, little in zip(gaps(records, kind, LARGE, LARGE), gaps(records, kind, small, small), strict=True)
        ]
        for kind in ("batch", "none")
    }
    noises = [record for record in records if record["kind"] == "noise"]
    at = SIZES.index
    return [
        Effect.ratio(
            f"Test errors of a batch of {LARGE:,} normalized as a whole over those with ghost batches of {GHOST}",
            whole,
            ghost,
            worth=1.1,
        ),
        Effect.over(
            f"Generalization gap at {LARGE:,} samples minus the gap at {small}, with batch normalization",
            widening["batch"],
            unit="points",
            worth=0.5,
        ),
        Effect.difference(
            "The same, minus this difference without normalization", widening["batch"], widening["none"], worth=0.5
        ),
        Effect.ratio(
            "Noise at 16 samples over noise at 256 in a linear layer (theory: 4)",
            (record["linear"][at(16)] for record in noises),
            (record["linear"][at(256)] for record in noises),
            worth=3.5,
        ),
        Effect.ratio(
            "Noise in a convolution over that of as many independent values, 256 images",
            (record["convolution"][at(256)] for record in noises),
            (theory(record, "convolution", 256) for record in noises),
            worth=2,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""
    noises = [record for record in records if record["kind"] == "noise"]
    at = SIZES.index

    def ratio(way: str, size: int) -> float:
        return mean(record[way][at(size)] / theory(record, way, size) for record in noises)

    without = mean(record["without replacement"][at(1024)] / record["linear"][at(1024)] for record in noises)
    convolution = effects[-1].mean

    def arm(kind: str, batch: int, group: int) -> str:
        return f"{mean(errors(records, kind, batch, group)):.2f} %"

    plain = (arm("none", LARGE, LARGE), arm("none", GHOST, GHOST))

    return (
        f"In a linear layer, one sample's activation deviates by {mean(r['linear'][at(16)] for r in noises):.2f} in "
        f"batches of 16 and {mean(r['linear'][at(256)] for r in noises):.3f} in batches of 256, "
        f"{ratio('linear', 16):.2f} and {ratio('linear', 256):.2f} times the prediction √((1 + x̂²/2)/m). If a batch is "
        f"half of all images, drawn without replacement, {without:.2f} of the noise remains (theory: {0.5**0.5:.2f}). "
        f"In a convolution, the noise is {convolution:.1f} times that of as many independent values: an image's "
        f"{noises[0]['pixels']} pixels have the weight of {noises[0]['pixels'] / convolution**2:.0f}. Test errors are "
        f"{arm('batch', LARGE, LARGE)} after training in batches of {LARGE:,} normalized as a whole, "
        f"{arm('ghost', LARGE, GHOST)} with ghost batches of {GHOST}, and {arm('batch', GHOST, GHOST)} with batches of "
        f"{GHOST}; without normalization, {plain[0]} with {LARGE:,} and {plain[1]} with {GHOST}. From {BATCHES[0]} to "
        f"{LARGE:,} samples, the gap between training and test accuracy changes by {effects[1].figures} with batch "
        f"normalization; this change minus the change without normalization is {effects[2].figures}."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw noise against batch size, and generalization gap against the number of samples normalized together."""
    figure = Figure(figsize=(13, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_noise(left, [record for record in records if record["kind"] == "noise"])
    for place, kind in enumerate(NAMES):
        arms = [(kind, size, size) for size in BATCHES]
        if kind == "ghost":  # one ghost batch of all samples is the whole batch
            arms = [*((kind, LARGE, size) for size in GHOSTS), ("batch", LARGE, LARGE)]
        rows = {group: gaps(records, *where, group) for *where, group in arms}
        right.errorbar(
            [group * 1.04 ** (place - 1) for group in rows],  # side by side, so that all are visible
            [mean(row) for row in rows.values()],
            [stdev(row) for row in rows.values()],
            label=NAMES[kind],
            color=COLOURS[kind],
            marker=MARKERS[kind],
            linestyle="--" if kind == "none" else "-",
            capsize=3,
        )
    ticks = sorted({*GHOSTS, *BATCHES})
    right.set_xscale("log", base=2)
    right.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    right.grid(alpha=0.3)
    right.set(
        title="Do noisier statistics generalize better?",
        xlabel="samples normalized together (without normalization: samples in the batch)",
        ylabel="generalization gap: test minus training errors (points)",
    )
    right.legend(loc="upper left", frameon=False)
    return figure


def _draw_noise(panel: Axes, noises: Sequence[Record]) -> None:
    shown = {
        "linear": ("#0072B2", "o", "linear layer"),
        "without replacement": (
            "#009E73",
            "v",
            f"the same, batches drawn without\nreplacement from {POPULATION:,} images",
        ),
        "convolution": ("#CC79A7", "s", f"convolution, {noises[0]['pixels']} pixels per image"),
    }
    for way, (colour, marker, label) in shown.items():
        rows = [[record[way][place] for record in noises] for place in range(len(SIZES))]
        panel.errorbar(
            SIZES,
            [mean(row) for row in rows],
            [stdev(row) for row in rows],
            label=label,
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=3,
        )
        expected = [mean(theory(record, way, size) for record in noises) for size in SIZES]
        panel.plot(SIZES, expected, color=colour, linewidth=1)
    panel.plot([], [], color="black", linewidth=1, label="lines: theory for independent values")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    panel.set_yticks([0.001, 0.01, 0.1, 1], ["0.001", "0.01", "0.1", "1"])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set(
        title="How noisy is one sample's activation?",
        xlabel="batch size (samples)",
        ylabel="deviation of the normalized activation (in σ)",
    )
    panel.set_ylim(bottom=2e-4)
    panel.legend(loc="lower left", frameon=False, fontsize=9)


EXPERIMENT = Experiment.of(
    Claim(
        name="noise",
        title="Noise that regularizes",
        statement="Large batches generalize worse, and normalizing them in parts restores the noise that they lack.",
        source="[Hoffer, Hubara & Soudry 2017](https://arxiv.org/abs/1705.08741)",
        setting=(
            f"The noise of one sample's activation over {DRAWS} batches, in layers at their initial values; and a "
            f"perceptron (2 × 128 units) on {IMAGES:,} images of MNIST, 30 epochs, batches of {BATCHES[0]} to "
            f"{LARGE:,}, the best of five learning rates for each, five seeds."
        ),
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
