"""Running averages against population statistics: which statistics should evaluation use?

    python experiments/running_averages.py --data-dir FOLDER

The claim (Wu & Johnson 2021, section 3): the exponential moving average that training keeps is a poor estimate of the
population's mean and variance. It lags behind the weights if it averages over many batches, and it is noisy if it
averages over few. Statistics that are recomputed for the current weights ("precise batch normalization",
`batchnorm.recalibrate`) are more accurate and more stable in evaluation.

Three normalized convolutions and a linear layer train on 12,800 images of MNIST once, in batches of 2, 8, 32 and 128,
by plain SGD at a rate of 0.1 for 32 samples and proportional to the batch size. Running statistics do not affect
training, so one training is enough for all momenta: after each step, its statistics update averages with momentum 0.01,
0.1 (torch's default), 0.5 and 0.9. (Momentum is torch's, the weight of the new batch.) The averages start at mean 0 and
variance 1, as in torch. At eight points of training, the same weights are tested on 5,000 test images with
each of these averages, and with population statistics from 5,000 training images in batches of 250, without their
labels. Nothing else differs.

Seen: population statistics are half a point more accurate at the end of training. The decisive effect is torch's
default momentum at batches of 2; the results for other batch sizes and momenta, and the stability in the second half of
training, are reported with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, pairwise
from statistics import mean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, main
from matplotlib.figure import Figure
from network import small_cnn, test, train
from torch import Tensor, nn

from batchnorm import BatchNorm2d, recalibrate
from batchnorm.compare import Data
from batchnorm.compare.inputs.sampling import IID

SIZES = (2, 8, 32, 128)
IMAGES = 12_800  # that each network sees
RATE = 0.1  # at 32 samples
LOOKS = 8
MOMENTA = (0.01, 0.1, 0.5, 0.9)
TESTED = 5000
MEASURED = 5000  # images that population statistics are taken from
WORTH = 0.5
POPULATION = "population"
WAYS = (*map(str, MOMENTA), POPULATION)
# Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = dict(zip(WAYS, ("#009E73", "#0072B2", "#E69F00", "#D55E00", "#000000"), strict=True))
MARKERS = dict(zip(WAYS, ("v", "o", "s", "^", "D"), strict=True))


class Averages:
    """Exponential moving averages of a network's batch statistics, with several momenta.

    The layers' own momentum is set to 1, so that their buffers hold the last batch's mean and unbiased variance.
    """

    def __init__(self, network: nn.Module, momenta: Sequence[float]) -> None:
        self._layers = [layer for layer in network.modules() if isinstance(layer, BatchNorm2d)]
        self._kept = {momentum: self._buffers() for momentum in momenta}
        for layer in self._layers:
            layer.momentum = 1.0

    def update(self) -> None:
        """Move every average by the last batch's statistics."""
        last = self._buffers()
        for momentum, kept in self._kept.items():
            for average, value in zip(kept, last, strict=True):
                average.lerp_(value, momentum)

    def copy_to_network(self, momentum: float) -> None:
        """Copy the average with this momentum to the network for evaluation; the next training step overwrites it."""
        for layer, mean_, var in zip(self._layers, self._kept[momentum][::2], self._kept[momentum][1::2], strict=True):
            layer.running_mean.copy_(mean_)
            layer.running_var.copy_(var)

    def _buffers(self) -> list[Tensor]:
        return [value.clone() for layer in self._layers for value in (layer.running_mean, layer.running_var)]


def cells(size: Size) -> Iterator[Cell]:
    """Yield a training for each batch size and seed."""
    images = 1_280 if size.quick else 4 * IMAGES if size.full else IMAGES
    for batch_size in (32, 128) if size.quick else SIZES:
        for seed in range(size.seeds):
            yield {"batch_size": batch_size, "images": images, "seed": seed}


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and return its accuracy in percent with each kind of statistics at each test."""
    (images,) = data.values()
    size, steps = cell["batch_size"], cell["images"] // cell["batch_size"]
    looks = [steps * (look + 1) // LOOKS for look in range(LOOKS)]
    network = small_cnn(BatchNorm2d, images)
    averages = Averages(network, MOMENTA)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    tested = images.x_test[:TESTED], images.y_test[:TESTED]
    measured = images.x_train[:MEASURED].split(250)

    def after(step: int) -> None:
        averages.update()
        if step not in looks:
            return
        for momentum in MOMENTA:
            averages.copy_to_network(momentum)
            found[str(momentum)].append(100 * test(network, *tested)[0])
        found[POPULATION].append(100 * test(recalibrate(network, measured).model, *tested)[0])

    optimizer = torch.optim.SGD(network.parameters(), lr=RATE * size / 32)
    order = islice(IID.batches(images.y_train, size, cell["seed"]), steps)
    diverged_at = train(network, optimizer, images.x_train, images.y_train, order, after)
    return {"steps": looks, **found, "diverged_at": diverged_at}


def at_end(records: Sequence[Record], way: str, batch_size: int) -> list[float]:
    """Return the accuracy in percent at the end, by seed."""
    found = [record for record in records if record["batch_size"] == batch_size]
    return [record[way][-1] for record in sorted(found, key=lambda record: record["seed"])]


def fluctuation(records: Sequence[Record], way: str, batch_size: int) -> list[float]:
    """Return the root mean square of the change between tests in the second half of training, by seed."""
    found = sorted((r for r in records if r["batch_size"] == batch_size), key=lambda record: record["seed"])
    second = [record[way][LOOKS // 2 - 1 :] for record in found]
    return [mean((b - a) ** 2 for a, b in pairwise(row)) ** 0.5 for row in second]


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the differences in accuracy and stability between population statistics and running averages."""
    sizes = sorted({record["batch_size"] for record in records})

    def more(momentum: float, size: int) -> Effect:
        what = f"Population statistics above the running average with momentum {momentum}, batches of {size}"
        accuracies = (at_end(records, way, size) for way in (POPULATION, str(momentum)))
        return Effect.difference(what, *accuracies, worth=WORTH)

    return [
        more(0.1, sizes[0]),
        *(more(0.1, size) for size in sizes[1:]),
        more(0.9, sizes[0]),
        more(0.9, sizes[-1]),
        more(0.01, sizes[0]),
        more(0.01, sizes[-1]),
        Effect.difference(
            f"Change of accuracy between late tests, momentum 0.1 minus population statistics, batches of {sizes[-1]}",
            fluctuation(records, "0.1", sizes[-1]),
            fluctuation(records, POPULATION, sizes[-1]),
            worth=WORTH,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""
    sizes = sorted({record["batch_size"] for record in records})

    def row(size: int) -> str:
        shown = [f"{mean(at_end(records, str(m), size)):.1f} % with momentum {m}" for m in MOMENTA]
        return f"{mean(at_end(records, POPULATION, size)):.1f} % with population statistics, {', '.join(shown)}"

    return (
        f"Accuracy of the same weights, trained in batches of {sizes[0]}: {row(sizes[0])}. Trained in batches of "
        f"{sizes[-1]}: {row(sizes[-1])}. Compared with torch's default momentum of 0.1, population "
        f"statistics are more accurate by {effects[0].figures} at batches of {sizes[0]}, and by "
        f"{effects[len(sizes) - 1].figures} at batches of {sizes[-1]}. Between tests in the second half of training "
        f"with batches of {sizes[-1]}, accuracy changes by {mean(fluctuation(records, '0.1', sizes[-1])):.2f} points "
        f"with momentum 0.1 and by {mean(fluctuation(records, POPULATION, sizes[-1])):.2f} with population statistics."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the accuracy during training, a panel for each batch size."""
    sizes = sorted({record["batch_size"] for record in records})
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True)
    for panel, size in zip(panels, sizes, strict=True):
        rows = [record for record in records if record["batch_size"] == size]
        for place, way in enumerate(WAYS):
            looks = list(zip(*(record[way] for record in rows), strict=True))
            shown = [size * step for step in rows[0]["steps"]]
            offset = (place - 2) * shown[-1] / 250  # side by side, so that all are visible
            panel.errorbar(
                [(x + offset) / 1000 for x in shown],
                [max(100 - mean(look), 0.1) for look in looks],
                [stdev(look) for look in looks],
                label=f"running average, momentum {way}" if way != POPULATION else "population statistics",
                color=COLOURS[way],
                marker=MARKERS[way],
                markersize=5,
                linewidth=2.2 if way == POPULATION else 1.3,
                capsize=2,
            )
        panel.set(title=f"batches of {size}", xlabel="training images seen (thousands)")
        panel.grid(alpha=0.3)
    ticks = (98, 95, 90, 80, 60, 10)
    panels[0].set_yscale("log")
    panels[0].set_yticks([100 - tick for tick in ticks], [str(tick) for tick in ticks])
    panels[0].set_ylim(95, 2)
    panels[0].minorticks_off()
    panels[0].set_ylabel(f"accuracy on {TESTED:,} test images (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("The same weights: which statistics should evaluation use?")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="running_averages",
        title="Running averages against population statistics",
        statement=(
            "The running averages that training keeps are a poor estimate of the population's statistics; statistics "
            "recomputed for the trained weights are more accurate and more stable."
        ),
        source="[Wu & Johnson 2021](https://arxiv.org/abs/2105.07576)",
        setting=(
            f"Three normalized convolutions on MNIST, {IMAGES:,} images once in batches of 2 to 128; the same weights "
            f"tested with running averages of four momenta and with statistics of {MEASURED:,} training images; "
            "five seeds."
        ),
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
