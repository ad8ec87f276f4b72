"""Batch normalization before or after the activation, and the bias that β makes redundant.

    python experiments/placement.py --data-dir FOLDER

The claims (Ioffe & Szegedy 2015, section 3.2): batch normalization belongs immediately before the nonlinearity, because
Wu + b is more likely to have a symmetric, non-sparse distribution than the output of a nonlinearity. And the bias b can
be left out there, because the subtraction of the mean cancels it and β replaces it.

Test: five convolutions with batch normalization before or after each activation, with ReLU and with the sigmoid. Each
network trains at five learning rates, and is judged at the rate with the fewest errors on 5,000 images that are used
neither for training nor for testing. For the bias, both networks train with a bias in each convolution, at one rate,
and the gradient of all biases is compared with that of all β at each step.

The test is fair because both places choose from the same rates, and have the same number of parameters, the same
initial values, and the same batches in the same order. The results name the chosen rates, so they show whether one is
at an end of the grid.

Seen: at least a tenth more test errors with batch normalization after ReLU than before it. The bias is judged
separately: it is redundant if its gradient is at least a thousand times smaller than that of β.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import fmean, geometric_mean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.figure import Figure
from network import test, train
from torch import nn

from batchnorm import BatchNorm2d
from batchnorm.compare import Data
from batchnorm.compare.inputs.sampling import IID

PLACES = {"before": ("before the activation", "#0072B2", "o"), "after": ("after the activation", "#D55E00", "s")}
ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
RATE_WITH_BIAS = 0.1
HELD_OUT = 5_000  # images at the end of the training set, which decide the best rate
WIDTHS = (16, 16, 32, 32, 64)


def cells(size: Size) -> Iterator[Cell]:
    """Yield each place and activation without biases at each rate, and ReLU with biases at one rate."""
    images, steps = (1_000, 20) if size.quick else (50_000, 6_000) if size.full else (6_000, 400)
    for seed in range(size.seeds):
        shared = {"seed": seed, "images": images, "steps": steps}
        for place in PLACES:
            for activation in ACTIVATIONS:
                for rate in RATES:
                    yield {"place": place, "activation": activation, "bias": False, "rate": rate, **shared}
            yield {"place": place, "activation": "relu", "bias": True, "rate": RATE_WITH_BIAS, **shared}


def network(place: str, activation: str, *, bias: bool, seed: int) -> nn.Sequential:
    """Return five convolutions, each with an activation and a batch normalization, and a linear layer.

    Weights have He's initial values, with or without biases; biases start at zero.
    """
    layers: list[nn.Module] = []
    before = 1
    for number, after in enumerate(WIDTHS):
        layers.append(nn.Conv2d(before, after, 3, stride=2 - number % 2, padding=1, bias=bias))
        pair = [BatchNorm2d(after), ACTIVATIONS[activation]()]
        layers += pair if place == "before" else reversed(pair)
        before = after
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def bias_over_beta(model: nn.Module) -> float:
    """Return the norm of the gradient of all convolutions' biases over that of the gradient of all β."""
    bias, beta = (
        torch.cat([layer.bias.grad for layer in model.modules() if isinstance(layer, kind)]).norm().item()
        for kind in (nn.Conv2d, BatchNorm2d)
    )
    return max(bias, torch.finfo(torch.float32).tiny) / beta


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and return its errors on held-out images and on test images."""
    mnist, seed = data["mnist"], cell["seed"]
    chosen = torch.randperm(len(mnist.x_train) - HELD_OUT, generator=torch.Generator().manual_seed(seed))
    chosen = chosen[: cell["images"]]
    x, y = mnist.x_train[chosen], mnist.y_train[chosen]
    model = network(cell["place"], cell["activation"], bias=cell["bias"], seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), cell["rate"], momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, cell["steps"])
    ratios = []

    def after(step: int) -> None:
        schedule.step()
        if cell["bias"]:
            ratios.append(bias_over_beta(model))

    train(model, optimizer, x, y, islice(IID.batches(y, 64, seed), cell["steps"]), after)
    held_out = mnist.x_train[-HELD_OUT:], mnist.y_train[-HELD_OUT:]
    found: Record = {"held_out": 100 * (1 - test(model, *held_out)[0])}
    found["wrong"] = 100 * (1 - test(model, mnist.x_test, mnist.y_test)[0])
    return found | ({"bias_over_beta": geometric_mean(ratios)} if ratios else {})


def best_rate(records: Sequence[Record], place: str, activation: str) -> float:
    """Return the rate with the fewest errors on the held-out images, on average over the seeds."""

    def errors(rate: float) -> float:
        return fmean(by_seed(records, "held_out", place=place, activation=activation, bias=False, rate=rate))

    return min(RATES, key=errors)


def at_best(records: Sequence[Record], place: str, activation: str) -> list[float]:
    """Return the percentage of wrong labels on test images at the best rate, for each seed."""
    rate = best_rate(records, place, activation)
    return by_seed(records, "wrong", place=place, activation=activation, bias=False, rate=rate)


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the ratios of errors for both activations, and the ratio of gradients."""
    with_bias = [record for record in records if record["bias"]]
    return [
        *(
            Effect.ratio(
                f"Test errors with batch normalization after {name} over errors with it before {name}",
                at_best(records, "after", activation),
                at_best(records, "before", activation),
                worth=1.1,
            )
            for activation, name in (("relu", "ReLU"), ("sigmoid", "the sigmoid"))
        ),
        Effect.over(
            "Gradient of β over gradient of the bias, with batch normalization right after the convolution",
            [1 / ratio for ratio in by_seed(with_bias, "bias_over_beta", place="before")],
            unit="×",
            worth=1_000,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def tuned(place: str, activation: str) -> str:
        rate = best_rate(records, place, activation)
        return f"{fmean(at_best(records, place, activation)):.2f} % wrong labels, at the rate {rate:g}"

    def at_one_rate(bias: bool) -> float:
        chosen = {"place": "before", "activation": "relu", "rate": RATE_WITH_BIAS}
        return fmean(by_seed(records, "wrong", bias=bias, **chosen))

    with_bias = [record for record in records if record["bias"]]
    ratios = {place: geometric_mean(by_seed(with_bias, "bias_over_beta", place=place)) for place in PLACES}
    return (
        f"With ReLU, each place at its best learning rate, batch normalization before the activation gave "
        f"{tuned('before', 'relu')}, and after it {tuned('after', 'relu')}. "
        f"With the sigmoid, it gave {tuned('before', 'sigmoid')}, before and {tuned('after', 'sigmoid')}, after it. "
        f"With batch normalization right after the convolution, the gradient of β was {1 / ratios['before']:,.0f} "
        f"times that of the bias; with the activation between them, {1 / ratios['after']:.1f} times. "
        f"At the rate {RATE_WITH_BIAS:g}, with ReLU and batch normalization right after the convolution, the network "
        f"gave {at_one_rate(True):.2f} % wrong labels with biases and {at_one_rate(False):.2f} % without."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the errors against the learning rate for both activations, and the gradient of the bias."""
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    *panels, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for panel, (activation, name) in zip(panels, (("relu", "ReLU"), ("sigmoid", "sigmoid")), strict=True):
        for place, (label, colour, marker) in PLACES.items():
            series = [
                by_seed(records, "wrong", place=place, activation=activation, bias=False, rate=rate) for rate in RATES
            ]
            aside = 0.97 if place == "before" else 1.03
            panel.errorbar(
                [rate * aside for rate in RATES],
                list(map(fmean, series)),
                list(map(stdev, series)),
                label=label,
                color=colour,
                marker=marker,
                capsize=3,
            )
            chosen = best_rate(records, place, activation)
            panel.scatter(
                chosen * aside, fmean(series[RATES.index(chosen)]), s=190, facecolors="none", edgecolors=colour
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
        ticks = (1, 2, 3, 5, 10, 20, 50, 90)
        panel.set_yticks(ticks, [str(tick) for tick in ticks])
        panel.set_ylim(1, 95)
        panel.minorticks_off()
        panel.set(title=f"Which place gives fewer errors? ({name})", xlabel="learning rate at the first step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("wrong labels on the test images (%)")
    for number, (place, (_, colour, marker)) in enumerate(PLACES.items()):
        ratios = by_seed([record for record in records if record["bias"]], "bias_over_beta", place=place)
        places = [number + 0.06 * (seed - (len(ratios) - 1) / 2) for seed in range(len(ratios))]
        right.scatter(places, ratios, color=colour, marker=marker, s=36)
    right.axhline(1, color="#777777", linestyle="--", linewidth=1)
    right.set_yscale("log")
    right.set_xticks(range(len(PLACES)), [label.replace(" the", " the\n") for label, *_ in PLACES.values()])
    right.set_xlim(-0.5, len(PLACES) - 0.5)
    right.set(
        title="Is the bias redundant? (ReLU)",
        xlabel="place of batch normalization",
        ylabel="gradient of the convolutions' biases ÷ gradient of β",
    )
    right.grid(axis="y", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [f"batch normalization {label} (ring: the rate chosen)" for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Batch normalization before or after the activation? (mean and deviation, and points, over seeds)")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="placement",
        title="Before or after the activation",
        statement="Batch normalization belongs right before the activation; the preceding layer can then omit its "
        "bias, which β replaces.",
        source="[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167)",
        setting="Five 3×3 convolutions (16, 16, 32, 32 and 64 channels), mean over positions, one linear layer; 6,000 "
        "images of MNIST, 400 batches of 64, SGD with momentum 0.9, the best of 5 learning rates for each, decaying to "
        "0; all 10,000 test images; 5 seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
