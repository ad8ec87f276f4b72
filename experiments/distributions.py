"""Steadier distributions: what a sigmoid of the last hidden layer gets, while the paper's network learns binary MNIST.

Claim: without batch normalization the distribution of the input to a typical sigmoid of the last hidden layer changes
much in the course of training, in mean and variance; with it, it is much more stable (Ioffe & Szegedy 2015, section 4.1
and figure 1, which shows its 15th, 50th and 85th percentiles).

Trial: the paper's network, three hidden layers of 100 sigmoid units on binary images of 28×28 with small Gaussian
weights, batches of 60. Every 200 steps a fixed set of 1,000 training images is sent through it in training mode, and
the three percentiles of what each unit of the last hidden layer gets are taken. How far a unit's distribution wanders
is, on the average over its three percentiles, the highest minus the lowest value in the whole training, in units of the
sigmoid's input; the typical unit is the one with the median of all 100. As a sigmoid with a wide input may bear larger
moves, they are also compared with the distribution's own width at the end, from the 15th to the 85th percentile.

Fair, because both have the same weights at the start (of deviation 0.1, which is Glorot's for these layers), see the
same batches in the same order, and train at the same five learning rates, from which each gets the one with the highest
test accuracy at the end. A faster network may wander farther, so they are compared at the same rate too.

Seen: without batch normalization the typical unit wanders at least twice as far, each network at its best rate.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, best_rate, by_seed, main
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from network import initialized_alike, test, train
from torch import Tensor, nn

from batchnorm.compare import Data
from batchnorm.compare.inputs.networks import sigmoid_mlp
from batchnorm.compare.inputs.sampling import IID

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
BATCH = 60
EVERY = 200
WATCHED = 1000
PERCENTILES = (15, 50, 85)
# Name and colour (of Okabe and Ito's, which the colour-blind can tell apart).
ARMS = {"none": ("without batch normalization", "#D55E00"), "batch": ("with batch normalization", "#0072B2")}


def cells(size: Size) -> Iterator[Cell]:
    """Both networks at every rate."""
    steps = 400 if size.quick else 50_000 if size.full else 7_000
    for seed in range(size.seeds):
        for rate in RATES[1:3] if size.quick else RATES:
            for norm in ARMS:
                yield {"norm": norm, "rate": rate, "steps": steps, "seed": seed}


def binary(data: Data) -> Data:
    """The images in black and white: 1 where a pixel is brighter than half of the brightest, else 0."""
    half = (data.x_train.min() + data.x_train.max()) / 2
    return replace(data, x_train=(data.x_train > half).float(), x_test=(data.x_test > half).float())


def percentiles(network: nn.Module, x: Tensor) -> Tensor:
    """The percentiles of what each sigmoid of the last hidden layer gets, `[3, units]`; the network stays as it was."""
    seen: list[Tensor] = []
    watched = copy.deepcopy(network).train()
    watched.get_submodule("hidden3.activation").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        watched(x)
    return torch.quantile(seen[0], torch.tensor(PERCENTILES) / 100, dim=0)


def wandering(history: Tensor) -> Tensor:
    """How far each unit wanders, `[units]`, from the history of its percentiles, `[T, 3, units]`."""
    return (history.amax(0) - history.amin(0)).mean(0)


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one, and return how far its units wandered, and the percentiles of the typical one."""
    images = binary(*data.values())
    network = initialized_alike(sigmoid_mlp, cell["norm"], images, cell["seed"])
    x = images.x_train[:WATCHED]
    history = [percentiles(network, x)]

    def look(step: int) -> None:
        if step % EVERY == 0:
            history.append(percentiles(network, x))

    optimizer = torch.optim.SGD(network.parameters(), lr=cell["rate"])
    batches = islice(IID.batches(images.y_train, BATCH, cell["seed"]), cell["steps"])
    train(network, optimizer, images.x_train, images.y_train, batches, look)
    whole = torch.stack(history)
    far = wandering(whole)
    width = whole[-1, 2] - whole[-1, 0]
    typical = int((far - far.median()).abs().argmin())
    return {
        "accuracy": test(network, images.x_test, images.y_test)[0],
        "wandering": far.median().item(),
        "widths": (far / width).median().item(),
        "typical": [[round(value, 3) for value in row] for row in whole[:, :, typical].tolist()],
    }


def effects(records: Sequence[Record]) -> list[Effect]:
    """How much farther it wanders, and what that is good for."""
    slow, own = best_rate(records, "none"), best_rate(records, "batch")

    def ratio(what: str, value: str, plain: float, normalized: float) -> Effect:
        before = by_seed(records, value, norm="none", rate=plain)
        after = by_seed(records, value, norm="batch", rate=normalized)
        return Effect.over(what, [a / b for a, b in zip(before, after, strict=True)], unit="×", worth=2)

    pairs = zip(
        by_seed(records, "accuracy", norm="batch", rate=own),
        by_seed(records, "accuracy", norm="none", rate=slow),
        strict=True,
    )
    return [
        ratio("How much farther it wanders without batch normalization, each at its best rate", "wandering", slow, own),
        ratio("The same, both at the best rate of the network without", "wandering", slow, slow),
        ratio("The same, each at its best rate, in widths of the unit's own distribution", "widths", slow, own),
        Effect.over(
            "Test accuracy with less that without, each at its best rate",
            [100 * (after - before) for after, before in pairs],
            unit="points",
            worth=0.5,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """In words."""

    def mean(value: str, norm: str) -> float:
        return statistics.fmean(by_seed(records, value, norm=norm, rate=best_rate(records, norm)))

    far, same, widths, _ = effects
    steps, slow, own = records[0]["steps"], best_rate(records, "none"), best_rate(records, "batch")
    return (
        f"In {steps:,} steps the percentiles of the input to the typical sigmoid ranged over "
        f"{mean('wandering', 'none'):.1f} units without batch normalization and over {mean('wandering', 'batch'):.1f} "
        f"with it, each at its best rate ({slow:g} and {own:g}); a sigmoid goes from 0.12 to 0.88 within four. So they "
        f"wander {far.figures} as far without as with; where both train at the rate {slow:g}, {same.figures} as far; "
        f"and, each at its best rate, in widths of the unit's own distribution, {widths.figures} as far. The network "
        f"with batch normalization was right on {100 * mean('accuracy', 'batch'):.1f} % of the test images, the one "
        f"without on {100 * mean('accuracy', 'none'):.1f} %."
    )


def draw(records: Sequence[Record]) -> Figure:
    """The percentiles of a typical unit in both, and how far the typical unit wanders at each rate."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    middle.sharey(left)
    for panel, (norm, (name, colour)) in zip((left, middle), ARMS.items(), strict=True):
        rate = best_rate(records, norm)
        curves = by_seed(records, "typical", norm=norm, rate=rate)[0]
        steps = [EVERY * look for look in range(len(curves))]
        low, half, high = zip(*curves, strict=True)
        panel.fill_between(steps, low, high, color=colour, alpha=0.2)
        for curve, percentile in zip((low, half, high), PERCENTILES, strict=True):
            panel.plot(steps, curve, color=colour, linewidth=2 if percentile == 50 else 1.2)
            panel.text(steps[-1] * 1.01, curve[-1], f"{percentile} %", va="center", fontsize=9, color=colour)
        panel.set_xlim(0, steps[-1] * 1.13)
        panel.set(title=f"{name[0].upper()}{name[1:]}\n(its best rate, {rate:g})", xlabel="training step")
        panel.grid(alpha=0.3)
    left.set_ylabel("input to a typical sigmoid of the last hidden layer:\n15th, 50th and 85th percentile")
    rates = sorted({record["rate"] for record in records})
    for place, (norm, (name, colour)) in enumerate(ARMS.items()):
        rows = [by_seed(records, "wandering", norm=norm, rate=rate) for rate in rates]
        for rate, row in zip(rates, rows, strict=True):
            right.plot([rate * (0.96, 1.04)[place]] * len(row), row, ".", color=colour, alpha=0.6, markersize=7)
        style = ("s--", "o-")[place]
        right.plot(rates, [statistics.fmean(row) for row in rows], style, color=colour, label=name, markersize=6)
    right.set_xscale("log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    right.set(
        title="How far the typical unit wanders\n(dots: each seed; line: their mean)",
        xlabel="learning rate",
        ylabel="highest − lowest value of a percentile\nin the whole training (units of the sigmoid's input)",
    )
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="upper left")
    figure.suptitle("Does what a hidden unit gets stay steadier during training with batch normalization?", fontsize=13)
    return figure


EXPERIMENT = Experiment(
    Claim(
        name="distributions",
        title="Steadier distributions",
        statement="With batch normalization the distribution of what a hidden unit gets is much more stable during "
        "training.",
        source="[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167), section 4.1, figure 1",
        setting="The paper's network (three hidden layers of 100 sigmoid units) on binary MNIST in batches of 60, for "
        f"7,000 steps (50,000 with `--full`), at the learning rates {', '.join(f'{rate:g}' for rate in RATES)}; five "
        "seeds.",
    ),
    cells,
    measure,
    effects,
    found,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
