"""Another domain: a network trained on MNIST, tested on changed digits with old and with new statistics.

    python experiments/domains.py --data-dir FOLDER

The claim (Li et al. 2016, "AdaBN"): the statistics of batch normalization hold much of a network's knowledge of its
domain. If they are replaced by the statistics of another domain's images, without labels, the network classifies these
images better.

Three normalized convolutions and a linear layer train on MNIST (20,000 images, two epochs of SGD with momentum 0.9, at
a rate that decays from 0.05 to zero). The test images come from other domains, made from MNIST's pixels between 0 and
1:

- inverted: 1 − x, black on white;
- noisy: Gaussian noise of deviation 0.4 added, clipped at 0 and 1;
- low-contrast: 0.35 + 0.3·x, grey on grey;
- USPS-like: without the margin of 3 pixels, reduced to 16×16 and enlarged again, so that the digits fill the image and
  are blurred and thick, like those of USPS.

They are scaled like the training images. The same weights are tested as trained, and after `batchnorm.recalibrate` with
2,000 images of the new domain, made from the end of MNIST's training set, which training did not use; their labels are
not used. There are two controls. The original images undergo the same procedure. A network with group normalization is
trained in the same way; it has no statistics of a domain, so it shows how hard the new images are for such a network.

Seen: accuracy on the four domains increases by two points on average. The gain on each domain is reported with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from network import small_cnn, test, train_to_rest
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import BatchNorm2d, recalibrate
from batchnorm.compare import Data, load

IMAGES = 20_000  # that training sees
EPOCHS = 2
BATCH = 64
RATE = 0.05
UNLABELLED = 2000
COUNTS = (16, 64, 256, UNLABELLED)
WORTH = 2.0
# Okabe and Ito's colours, which colour-blind people can distinguish.
WAYS = {
    "trained": ("BatchNorm, as trained", "#0072B2"),
    "recalibrated": ("BatchNorm, statistics of the new images", "#D55E00"),
    "group": ("GroupNorm, as trained", "#009E73"),
}


def usps_like(x: Tensor) -> Tensor:
    """Return images `[N, 1, 28, 28]` without their margin, through 16×16 pixels."""
    inner = x[..., 3:-3, 3:-3]
    small = F.interpolate(inner, (16, 16), mode="bilinear", antialias=True)
    return F.interpolate(small, x.shape[-2:], mode="bilinear")


DOMAINS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "as in training": lambda x, _: x,
    "inverted": lambda x, _: 1 - x,
    "noisy": lambda x, generator: (x + 0.4 * torch.randn(x.shape, generator=generator)).clamp(0, 1),
    "low-contrast": lambda x, _: 0.35 + 0.3 * x,
    "USPS-like": lambda x, _: usps_like(x),
}
OTHERS = tuple(DOMAINS)[1:]


def cells(size: Size) -> Iterator[Cell]:
    """Yield one network with each normalization for each seed."""
    images = 2_000 if size.quick else 58_000 if size.full else IMAGES
    for seed in range(size.seeds):
        for norm in ("batch", "group"):
            yield {"norm": norm, "images": images, "seed": seed}


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and return its accuracy in percent on each domain."""
    (images,) = data.values()
    batch = cell["norm"] == "batch"
    network = small_cnn(BatchNorm2d if batch else lambda channels: nn.GroupNorm(4, channels), images, bias=not batch)
    steps = EPOCHS * cell["images"] // BATCH
    x, y = images.x_train[: cell["images"]], images.y_train[: cell["images"]]
    train_to_rest(network, x, y, rate=RATE, batch_size=BATCH, steps=steps, seed=cell["seed"])
    black, white = images.x_train.aminmax()
    generator = torch.Generator().manual_seed(cell["seed"])
    found: dict[str, dict[str, float]] = {}
    for name, change in DOMAINS.items():

        def changed(given: Tensor, change: Callable[[Tensor, torch.Generator], Tensor] = change) -> Tensor:
            return black + (white - black) * change((given - black) / (white - black), generator)

        tested = changed(images.x_test)
        found[name] = {"trained": 100 * test(network, tested, images.y_test)[0]}
        if batch:
            unlabelled = changed(images.x_train[-UNLABELLED:])
            for count in COUNTS:
                adapted = recalibrate(network, unlabelled[:count].split(250)).model
                found[name][str(count)] = 100 * test(adapted, tested, images.y_test)[0]
    return {"accuracy": found}


def accuracy(records: Sequence[Record], domain: str, way: str, count: int = UNLABELLED) -> list[float]:
    """Return the accuracy on one domain in percent, by seed."""
    key = str(count) if way == "recalibrated" else "trained"
    return [found[domain][key] for found in by_seed(records, "accuracy", norm="group" if way == "group" else "batch")]


def gain(records: Sequence[Record], domain: str, count: int = UNLABELLED) -> list[float]:
    """Return the points that recalibration gains on one domain, by seed."""
    ways = (accuracy(records, domain, "recalibrated", count), accuracy(records, domain, "trained"))
    return [after - before for after, before in zip(*ways, strict=True)]


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the gain from recalibration, over all new domains and on each."""
    gains = {domain: gain(records, domain) for domain in OTHERS}
    average = [mean(each) for each in zip(*gains.values(), strict=True)]
    return [
        Effect.over("Gain from recalibration, mean of the four domains", average, unit="points", worth=WORTH),
        *(
            Effect.over(f"Gain from recalibration, {domain} digits", gains[domain], unit="points", worth=WORTH)
            for domain in OTHERS
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def on(domain: str) -> str:
        before, after, group = (mean(accuracy(records, domain, way)) for way in WAYS)
        return f"{before:.1f} % of {domain} digits as trained and {after:.1f} % recalibrated (GroupNorm {group:.1f} %)"

    same = [mean(accuracy(records, "as in training", way)) for way in ("trained", "recalibrated")]
    few = mean(mean(gain(records, domain, COUNTS[0])) for domain in OTHERS)
    return (
        f"The network classifies {'; '.join(on(domain) for domain in OTHERS)}. On average over the four domains, "
        f"{UNLABELLED:,} images without labels change accuracy by {effects[0].figures}, {COUNTS[0]} images by "
        f"{few:.1f} points. On digits like those of training, accuracy is {same[0]:.1f} % before and {same[1]:.1f} % "
        "after recalibration."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the accuracy on each domain with an example digit, and the gain against the number of unlabelled images."""
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (way, (label, colour)) in enumerate(WAYS.items()):
        rows = [accuracy(records, domain, way) for domain in DOMAINS]
        at = [index + (place - 1) * 0.27 for index in range(len(DOMAINS))]
        heights = [mean(row) for row in rows]
        left.bar(at, heights, 0.25, yerr=[stdev(row) for row in rows], label=label, color=colour, capsize=3)
        for x, height, row in zip(at, heights, rows, strict=True):
            left.text(x, height + stdev(row) + 1, f"{height:.0f}", ha="center", fontsize=9)
    left.axhline(10, color="black", linewidth=0.8, linestyle=":", label="guessing")
    left.set(ylim=(0, 122), yticks=range(0, 101, 20), ylabel="accuracy on the 10,000 test images (%)")
    left.set_xticks(range(len(DOMAINS)), [name + 5 * "\n" for name in DOMAINS], va="top")
    left.tick_params(axis="x", length=0)
    _show_digits(left)
    left.set_title("How well does a network from MNIST read changed digits?")
    left.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    colours = dict(zip(OTHERS, ("#E69F00", "#56B4E9", "#CC79A7", "#000000"), strict=True))
    markers = dict(zip(OTHERS, "osvD", strict=True))
    for place, domain in enumerate(OTHERS):
        rows = [gain(records, domain, count) for count in COUNTS]
        right.errorbar(
            [count * 1.05 ** (place - 1.5) for count in COUNTS],  # side by side, so that all are visible
            [mean(row) for row in rows],
            [stdev(row) for row in rows],
            label=domain,
            color=colours[domain],
            marker=markers[domain],
            capsize=3,
        )
    right.axhline(0, color="black", linewidth=0.8, linestyle=":")
    right.set_xscale("log")
    right.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    right.minorticks_off()
    right.grid(alpha=0.3)
    right.set(xlabel="unlabelled images of the new domain", ylabel="gain from their statistics (points)")
    right.set_title("How many images does it take?")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, frameon=False, columnspacing=1.2)
    return figure


def _show_digits(panel: Axes) -> None:
    """Show a digit of each domain below its name."""
    images = load("mnist-mini").x_test
    digit = (images[1:2] - images.min()) / (images.max() - images.min())
    generator = torch.Generator().manual_seed(0)
    for place, change in enumerate(DOMAINS.values()):
        inset = panel.inset_axes((place - 0.3, -0.19, 0.6, 0.13), transform=panel.get_xaxis_transform())
        inset.imshow(change(digit, generator)[0, 0], cmap="gray", vmin=0, vmax=1)
        inset.set(xticks=[], yticks=[])


EXPERIMENT = Experiment.of(
    Claim(
        name="domains",
        title="Another domain",
        statement=(
            "A trained network becomes more accurate on a new domain if its batch normalization gets the statistics of "
            "that domain's images; labels are not needed."
        ),
        source="[Li et al. 2016](https://arxiv.org/abs/1603.04779)",
        setting=(
            f"Three normalized convolutions trained on {IMAGES:,} images of MNIST, tested on inverted, noisy, "
            f"low-contrast and USPS-like digits, as trained and with the statistics of {UNLABELLED:,} such "
            "images; five seeds."
        ),
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
