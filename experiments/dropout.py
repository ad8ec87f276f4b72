"""Dropout before batch normalization: does it distort the running variance, and at what cost?

    python experiments/dropout.py --data-dir FOLDER

The claim (Li, Chen, Hu & Yang 2018): after dropout, activations vary more in training than in evaluation, where nothing
is dropped. A batch normalization after the dropout learns the larger variance as its running variance. In evaluation
its output is therefore too small, layer after layer, and the network makes more errors. Dropout after the last
normalization does no such harm, so the paper recommends this place.

Test: a network of five normalized convolutions trains with dropout before the convolutions 2 to 5, each followed by its
normalization (the paper's case (b)), or once after the last normalization, at several rates. The first kind is then
evaluated twice with the same weights: with its running statistics, and with the statistics of training images without
dropout, layer by layer from the input (`recalibrate(passes="sequential")`).

The test is fair because the decisive effect compares the same weights, and so measures only the shift itself, not the
different amounts of dropout. All arms of a seed start from the same values and see the same batches in the same order.
The learning rate decays to zero, so that running averages do not lag; the network without dropout shows how much lag
remains.

Seen: the shift costs at least a tenth more errors at a dropout rate of 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, geometric_mean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.figure import Figure
from network import test, train_to_rest
from torch import Tensor, nn

from batchnorm import BatchNorm2d, recalibrate
from batchnorm.compare import Data

RATES = (0.1, 0.3, 0.5)
WIDTHS = (16, 16, 32, 32, 64)
COLOURS = {0: "#777777", 0.1: "#56B4E9", 0.3: "#0072B2", 0.5: "#D55E00"}


def cells(size: Size) -> Iterator[Cell]:
    """Yield no dropout, and each rate in both places."""
    images, steps = (1_000, 30) if size.quick else (50_000, 8_000) if size.full else (8_000, 1_000)
    for seed in range(size.seeds):
        for place, drop in [("nowhere", 0.0), *((place, rate) for rate in RATES for place in ("before", "behind"))]:
            yield {"place": place, "drop": drop, "seed": seed, "images": images, "steps": steps}


def network(place: str, drop: float) -> nn.Sequential:
    """Return five normalized convolutions, with dropout before all but the first, or after the last."""
    layers: list[nn.Module] = []
    before = 1
    for number, after in enumerate(WIDTHS):
        if number and place == "before":
            layers.append(nn.Dropout(drop))
        convolution = nn.Conv2d(before, after, 3, stride=2 - number % 2, padding=1, bias=False)
        layers += [convolution, BatchNorm2d(after), nn.ReLU()]
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if place == "behind":
        layers.append(nn.Dropout(drop))
    return nn.Sequential(*layers, nn.Linear(before, 10))


@torch.no_grad()
def variance_ratios(model: nn.Module, x: Tensor) -> list[float]:
    """Return, for each batch normalization, its running variance over the variance of its input in evaluation.

    Each ratio is the geometric mean over the layer's channels, without channels that are constant in evaluation.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    ratios: dict[nn.Module, float] = {}

    def observe(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        variance = inputs[0].transpose(0, 1).flatten(1).var(1)
        varies = variance > 0
        ratios[layer] = (layer.running_var[varies] / variance[varies]).log().mean().exp().item()

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return [ratios[layer] for layer in layers]


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and evaluate it with its running statistics and with statistics without dropout."""
    mnist = data["mnist"]
    generator = torch.Generator().manual_seed(cell["seed"])
    chosen = torch.randperm(len(mnist.x_train), generator=generator)[: cell["images"]]
    x, y = mnist.x_train[chosen], mnist.y_train[chosen]
    model = network(cell["place"], cell["drop"])
    train_to_rest(model, x, y, rate=0.1, batch_size=64, steps=cell["steps"], seed=cell["seed"])

    def wrong() -> float:
        return 100 * (1 - test(model, mnist.x_test, mnist.y_test)[0])

    found = {"wrong": wrong(), "ratios": variance_ratios(model, x[:2_000])}
    recalibrate(model, x[:2_000].split(500), passes="sequential", inplace=True)
    return {**found, "recalibrated": wrong()}


def behind_dropout(record: Record) -> float:
    """Return the ratio of variances, as a geometric mean over the normalizations after a dropout."""
    return geometric_mean(record["ratios"][1:])


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the cost of the shift, the cost of the place, and the shift."""
    half = {"place": "before", "drop": 0.5}
    shifted, recalibrated = by_seed(records, "wrong", **half), by_seed(records, "recalibrated", **half)
    behind = by_seed(records, "wrong", place="behind", drop=0.5)
    shift = by_seed([record | {"shift": behind_dropout(record)} for record in records], "shift", **half)
    return [
        Effect.ratio(
            "Test errors with dropout of 0.5 before the normalizations, over errors of the same weights with "
            "statistics without dropout",
            shifted,
            recalibrated,
            worth=1.1,
        ),
        Effect.ratio(
            "Test errors with dropout of 0.5 before the normalizations, over errors with it after the last one",
            shifted,
            behind,
            worth=1.1,
        ),
        Effect.over(
            "Running variance after dropout of 0.5, over the variance in evaluation", shift, unit="×", worth=1.1
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def mean(value: str, place: str, drop: float) -> float:
        return fmean(by_seed(records, value, place=place, drop=drop))

    as_trained = mean("wrong", "before", 0.5)
    recalibrated = mean("recalibrated", "before", 0.5) - as_trained
    moved = mean("wrong", "behind", 0.5) - as_trained
    without = geometric_mean(behind_dropout(record) for record in records if record["place"] == "nowhere")
    return (
        f"After dropout of 0.5, the running variances were {effects[2].mean:.2f} times the variances in evaluation; "
        f"without dropout, {without:.2f} times. "
        f"With these running variances, {as_trained:.2f} % of the test images got a wrong label; with the same weights "
        f"and statistics without dropout, {mean('recalibrated', 'before', 0.5):.2f} %. "
        f"With dropout of 0.5 after the last normalization, the errors were {mean('wrong', 'behind', 0.5):.2f} %, and "
        f"without dropout {mean('wrong', 'nowhere', 0.0):.2f} %. "
        f"The statistics thus changed the errors by {recalibrated:+.2f} points, and the place by {moved:+.2f}.".replace(
            "-", "−"
        )
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the shift from layer to layer, and the errors against the dropout rate."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, drop in [("nowhere", 0.0), *(("before", rate) for rate in RATES)]:
        rows = [record["ratios"] for record in records if (record["place"], record["drop"]) == (place, drop)]
        layers = list(zip(*rows, strict=True))
        numbers = range(1, len(layers) + 1)
        bars = [stdev(values) for values in layers]
        label = f"dropout {drop:g}" if drop else "no dropout"
        left.errorbar(numbers, list(map(fmean, layers)), bars, label=label, color=COLOURS[drop], marker="o", capsize=3)
    left.axhline(1, color="#777777", linewidth=0.8, linestyle=":")
    left.set(
        title="Does the running variance match evaluation?\n(dropout before normalizations 2 to 5)",
        xlabel="batch normalization, from the input",
        ylabel="running variance ÷ variance in evaluation",
        xticks=numbers,
    )
    lines = {
        ("before", "wrong"): ("before the normalizations, as trained", "#D55E00", "o"),
        ("before", "recalibrated"): ("the same weights, statistics without dropout", "#0072B2", "s"),
        ("behind", "wrong"): ("after the last normalization", "#009E73", "D"),
    }
    for shift, ((place, value), (label, colour, marker)) in enumerate(lines.items()):
        series = [by_seed(records, value, place="nowhere", drop=0.0)]
        series += [by_seed(records, value, place=place, drop=rate) for rate in RATES]
        right.errorbar(
            [rate + 0.006 * (shift - 1) for rate in (0, *RATES)],
            list(map(fmean, series)),
            list(map(stdev, series)),
            label=label,
            color=colour,
            marker=marker,
            capsize=3,
        )
    right.set(
        title="How many more errors does it cause?",
        xlabel="dropout rate (share of activations that are dropped)",
        ylabel="wrong labels on the test images (%)",
        xticks=(0, *RATES),
    )
    right.set_ylim(bottom=0)
    left.legend(frameon=False, loc="upper left")
    right.legend(frameon=False, loc="upper left", title="dropout", alignment="left")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.suptitle("Does dropout distort the batch normalization after it? (mean and deviation over seeds)")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="dropout",
        title="Dropout before batch normalization",
        statement="After dropout, the running variance is too large for evaluation, where nothing is dropped, which "
        "costs accuracy; dropout belongs after the last batch normalization.",
        source="[Li, Chen, Hu & Yang 2018](https://arxiv.org/abs/1801.05134)",
        setting="Five 3×3 convolutions (16, 16, 32, 32 and 64 channels, each normalized, ReLU), mean over positions, "
        "one linear layer; 8,000 images of MNIST, 1,000 batches of 64, SGD with momentum 0.9 and a rate from 0.1 "
        "to 0; all 10,000 test images; 5 seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
