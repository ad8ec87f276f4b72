"""Running averages against population statistics: what evaluation is given, and what it should be given.

    python experiments/running_averages.py --data-dir FOLDER

The claim is Wu & Johnson's (2021, section 3): the exponential moving average that training keeps is a poor estimate
of the population's mean and variance. It lags behind the weights where it averages over many batches, it is noisy
where it averages over few, and statistics computed anew for the weights as they are ("precise batch normalization",
`batchnorm.recalibrate`) are more accurate and steadier in evaluation.

Three normalized convolutions and a linear layer train on 12,800 images of MNIST once, with plain SGD at the rate 0.1
for 32 samples and proportional to the batch size, in batches of 2, 8, 32 and 128. In training the running statistics
decide nothing, so that one training serves every way to keep them: after each step the averages with momentum 0.01,
0.1 (torch's default), 0.5 and 0.9 move by that step's statistics. (Momentum is torch's, the weight of the new batch.)
They begin at mean 0 and variance 1, as in torch. At eight points of the training the same weights are tested on 5,000
test images with each of these averages, and with population statistics from 5,000 training images in batches of 250,
whose labels are not needed. Nothing else differs.

The claim is seen where population statistics are half a point more accurate at the end of training. What decides is
torch's default momentum at batches of 2; the other ends, and the steadiness in the second half of training, are
reported beside it.
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
# The colours of Okabe and Ito, which the colour-blind can tell apart.
COLOURS = dict(zip(WAYS, ("#009E73", "#0072B2", "#E69F00", "#D55E00", "#000000"), strict=True))
MARKERS = dict(zip(WAYS, ("v", "o", "s", "^", "D"), strict=True))


class Averages:
    """Exponential moving averages of a network's batch statistics, with several momenta.

    The layers' own momentum becomes 1, so that their buffers hold the last batch's mean and unbiased variance.
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

    def give(self, momentum: float) -> None:
        """Give the network the average with this momentum, for evaluation; the next step of training replaces it."""
        for layer, mean_, var in zip(self._layers, self._kept[momentum][::2], self._kept[momentum][1::2], strict=True):
            layer.running_mean.copy_(mean_)
            layer.running_var.copy_(var)

    def _buffers(self) -> list[Tensor]:
        return [value.clone() for layer in self._layers for value in (layer.running_mean, layer.running_var)]


def cells(size: Size) -> Iterator[Cell]:
    """A training for each batch size."""
    images = 1_280 if size.quick else 4 * IMAGES if size.full else IMAGES
    for batch_size in (32, 128) if size.quick else SIZES:
        for seed in range(size.seeds):
            yield {"batch_size": batch_size, "images": images, "seed": seed}


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and tests it with each kind of statistics: accuracy in percent at each look."""
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
            averages.give(momentum)
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


def wobble(records: Sequence[Record], way: str, batch_size: int) -> list[float]:
    """Return the root mean square of the change from look to look in the second half of training, by seed."""
    found = sorted((r for r in records if r["batch_size"] == batch_size), key=lambda record: record["seed"])
    second = [record[way][LOOKS // 2 - 1 :] for record in found]
    return [mean((b - a) ** 2 for a, b in pairwise(row)) ** 0.5 for row in second]


def effects(records: Sequence[Record]) -> list[Effect]:
    """How much more accurate, and steadier, population statistics are."""
    sizes = sorted({record["batch_size"] for record in records})

    def more(momentum: float, size: int) -> Effect:
        pairs = zip(at_end(records, POPULATION, size), at_end(records, str(momentum), size), strict=True)
        what = f"Population statistics above the running average with momentum {momentum}, batches of {size}"
        return Effect.over(what, [a - b for a, b in pairs], unit="points", worth=WORTH)

    steadier = zip(wobble(records, "0.1", sizes[-1]), wobble(records, POPULATION, sizes[-1]), strict=True)
    return [
        more(0.1, sizes[0]),
        *(more(0.1, size) for size in sizes[1:]),
        more(0.9, sizes[0]),
        more(0.9, sizes[-1]),
        more(0.01, sizes[0]),
        more(0.01, sizes[-1]),
        Effect.over(
            f"How much less accuracy moves from look to look in the second half, momentum 0.1, batches of {sizes[-1]}",
            [a - b for a, b in steadier],
            unit="points",
            worth=WORTH,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """What was seen."""
    sizes = sorted({record["batch_size"] for record in records})

    def row(size: int) -> str:
        shown = [f"{mean(at_end(records, str(m), size)):.1f} % with momentum {m}" for m in MOMENTA]
        return f"{mean(at_end(records, POPULATION, size)):.1f} % with population statistics, {', '.join(shown)}"

    return (
        f"The same weights, trained in batches of {sizes[0]}, classify {row(sizes[0])}. Trained in batches of "
        f"{sizes[-1]}: {row(sizes[-1])}. At torch's default momentum of 0.1 population statistics are "
        f"{effects[0].figures} more accurate at batches of {sizes[0]}, and {effects[len(sizes) - 1].figures} at "
        f"batches of {sizes[-1]}. From look to look in the second half of training with batches of {sizes[-1]}, "
        f"accuracy moves by {mean(wobble(records, '0.1', sizes[-1])):.2f} points with momentum 0.1 and by "
        f"{mean(wobble(records, POPULATION, sizes[-1])):.2f} with population statistics."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Accuracy through training, a panel for each batch size."""
    sizes = sorted({record["batch_size"] for record in records})
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True)
    for panel, size in zip(panels, sizes, strict=True):
        rows = [record for record in records if record["batch_size"] == size]
        for place, way in enumerate(WAYS):
            looks = list(zip(*(record[way] for record in rows), strict=True))
            shown = [size * step for step in rows[0]["steps"]]
            apart = (place - 2) * shown[-1] / 250  # side by side, so that none hides another
            panel.errorbar(
                [(x + apart) / 1000 for x in shown],
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


EXPERIMENT = Experiment(
    claim=Claim(
        name="running_averages",
        title="Running averages against population statistics",
        statement=(
            "The running averages that training keeps are a poor estimate of the population's statistics; statistics "
            "computed anew for the trained weights are more accurate and steadier."
        ),
        source="[Wu & Johnson 2021](https://arxiv.org/abs/2105.07576)",
        setting=(
            f"Three normalized convolutions on MNIST, {IMAGES:,} images once in batches of 2 to 128; the same weights "
            f"tested with running averages of four momenta and with statistics of {MEASURED:,} training images; "
            "five seeds."
        ),
    ),
    cells=cells,
    measure=measure,
    effects=effects,
    found=found,
    draw=draw,
)


if __name__ == "__main__":
    main(EXPERIMENT)
