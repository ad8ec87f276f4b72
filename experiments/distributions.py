"""Steadier distributions: the input of a sigmoid in the last hidden layer during training of the paper's network.

Claim: without batch normalization, the distribution of the input to a typical sigmoid of the last hidden layer changes
substantially during training, in mean and variance; with it, the distribution is much more stable (Ioffe & Szegedy
2015, section 4.1 and figure 1, which shows its 15th, 50th and 85th percentiles).

Test: the paper's network, three hidden layers of 100 sigmoid units with small Gaussian weights, on binary images of
28×28 in batches of 60. Every 200 steps, a fixed set of 1,000 training images passes through it in training mode, and
the three percentiles of the input of each unit in the last hidden layer are recorded. The drift of a unit is the
highest minus the lowest value of a percentile over the whole training, averaged over the three percentiles, in units of
the sigmoid's input. The typical unit is the one with the median drift of all 100. A sigmoid with a wide input may
tolerate larger changes, so the drift is also measured relative to the distribution's width at the end, from the 15th to
the 85th percentile.

The test is fair because both networks have the same initial weights (with deviation 0.1, which is Glorot's for these
layers), see the same batches in the same order, and train at the same five learning rates; each is judged at the rate
with the highest final test accuracy. A faster network may drift farther, so they are also compared at the same rate.

Seen: without batch normalization, the typical unit drifts at least twice as far, each network at its best rate.
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
# Name and colour (from Okabe and Ito's palette, which colour-blind people can distinguish).
ARMS = {"none": ("without batch normalization", "#D55E00"), "batch": ("with batch normalization", "#0072B2")}


def cells(size: Size) -> Iterator[Cell]:
    """Yield both networks at every rate."""
    steps = 400 if size.quick else 50_000 if size.full else 7_000
    for seed in range(size.seeds):
        for rate in RATES[1:3] if size.quick else RATES:
            for norm in ARMS:
                yield {"norm": norm, "rate": rate, "steps": steps, "seed": seed}


def binary(data: Data) -> Data:
    """Return the images in black and white: 1 for a pixel above half of the range, else 0."""
    half = (data.x_train.min() + data.x_train.max()) / 2
    return replace(data, x_train=(data.x_train > half).float(), x_test=(data.x_test > half).float())


def percentiles(network: nn.Module, x: Tensor) -> Tensor:
    """Return the percentiles of each sigmoid's input in the last hidden layer, `[3, units]`."""
    seen: list[Tensor] = []
    watched = copy.deepcopy(network).train()
    watched.get_submodule("hidden3.activation").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        watched(x)
    return torch.quantile(seen[0], torch.tensor(PERCENTILES) / 100, dim=0)


def wandering(history: Tensor) -> Tensor:
    """Return the drift of each unit, `[units]`, from the history of its percentiles, `[T, 3, units]`."""
    return (history.amax(0) - history.amin(0)).mean(0)


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and return the drift of its units, and the percentiles of the typical unit."""
    images = binary(*data.values())
    network = initialized_alike(sigmoid_mlp, cell["norm"], images, cell["seed"])
    x = images.x_train[:WATCHED]
    history = [percentiles(network, x)]

    def record(step: int) -> None:
        if step % EVERY == 0:
            history.append(percentiles(network, x))

    optimizer = torch.optim.SGD(network.parameters(), lr=cell["rate"])
    batches = islice(IID.batches(images.y_train, BATCH, cell["seed"]), cell["steps"])
    train(network, optimizer, images.x_train, images.y_train, batches, record)
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
    """Return the ratios of drift, and the difference in accuracy."""
    slow, own = best_rate(records, "none"), best_rate(records, "batch")

    def ratio(what: str, value: str, plain: float, normalized: float) -> Effect:
        before = by_seed(records, value, norm="none", rate=plain)
        after = by_seed(records, value, norm="batch", rate=normalized)
        return Effect.ratio(what, before, after, worth=2)

    plain, normalized = (
        [100 * value for value in by_seed(records, "accuracy", norm=norm, rate=rate)]
        for norm, rate in (("none", slow), ("batch", own))
    )
    return [
        ratio("Drift without over drift with batch normalization, each at its best rate", "wandering", slow, own),
        ratio("The same, both at the best rate of the network without it", "wandering", slow, slow),
        ratio("The same in widths of the unit's own distribution, each at its best rate", "widths", slow, own),
        Effect.difference(
            "Test accuracy with minus without batch normalization, each at its best rate", normalized, plain, worth=0.5
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def mean(value: str, norm: str) -> float:
        return statistics.fmean(by_seed(records, value, norm=norm, rate=best_rate(records, norm)))

    far, same, widths, _ = effects
    steps, slow, own = records[0]["steps"], best_rate(records, "none"), best_rate(records, "batch")
    return (
        f"In {steps:,} steps, the percentiles of the typical sigmoid's input drifted by "
        f"{mean('wandering', 'none'):.1f} units without batch normalization and by {mean('wandering', 'batch'):.1f} "
        f"with it, each at its best rate ({slow:g} and {own:g}). For scale, a sigmoid rises from 0.12 to 0.88 over "
        f"four units. The drift without batch normalization was thus {far.figures} the drift with it. "
        f"With both at the rate {slow:g}, it was {same.figures}; in widths of the unit's own "
        f"distribution, each at its best rate, {widths.figures}. The network with batch normalization "
        f"classified {100 * mean('accuracy', 'batch'):.1f} % of the test images correctly, the network "
        f"without it {100 * mean('accuracy', 'none'):.1f} %."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the percentiles of a typical unit in both networks, and the drift of the typical unit at each rate."""
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
        title="Drift of the typical unit\n(dots: each seed; line: their mean)",
        xlabel="learning rate",
        ylabel="highest − lowest value of a percentile\nover the whole training (units of the sigmoid's input)",
    )
    right.grid(alpha=0.3)
    right.legend(frameon=False, loc="upper left")
    figure.suptitle("Is a hidden unit's input more stable during training with batch normalization?", fontsize=13)
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="distributions",
        title="Steadier distributions",
        statement="With batch normalization, the distribution of a hidden unit's input is much more stable during "
        "training.",
        source="[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167), section 4.1, figure 1",
        setting="The paper's network (three hidden layers of 100 sigmoid units) on binary MNIST in batches of 60, for "
        f"7,000 steps (50,000 with `--full`), at the learning rates {', '.join(f'{rate:g}' for rate in RATES)}; five "
        "seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
