"""A smoother landscape: loss and gradient along the gradient's direction, with and without batch normalization.

Claim: batch normalization makes the loss a smoother function of the parameters. Along the gradient, the loss varies
less, the gradient changes less (it predicts the next step better), and the effective β-smoothness, the change of the
gradient over the distance moved, is lower (Santurkar et al. 2018, section 3.1 and figure 4).

Test: the comparison's small VGG (six convolutions, two linear layers) trains on Fashion-MNIST at half its size by plain
stochastic gradient descent. At 20 of its steps, on the batch of that step, the parameters w move against the gradient g
by a·g, with a from half of the learning rate to four times the rate. Over these a, the range of the loss is its highest
minus its lowest value; the change of the gradient is the largest ‖∇L(w − a·g) − g‖; the effective β-smoothness is the
largest ‖∇L(w − a·g) − g‖ / ‖a·g‖. The loss uses the batch's statistics, as in training mode. The result is the
geometric mean over the steps.

The test is fair because both networks have the same initial weights (He's initialization), see the same batches in the
same order, and train at the same rates. The distance moved depends on the rate, so the networks are compared at one
rate: the rate at which the network without normalization is most accurate. They are also compared each at its own best
rate.

Seen: the effective β-smoothness without batch normalization is at least twice as large as with it, so that steps of
twice the length are equally safe with it.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, best_rate, by_seed, main
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from network import half_size, initialized_alike, test
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare import Data
from batchnorm.compare.inputs.networks import vgg
from batchnorm.compare.inputs.sampling import IID

RATES = (0.03, 0.1, 0.3, 1.0)
MULTIPLES = (0.5, 1.0, 2.0, 3.0, 4.0)  # of the learning rate
BATCH = 64
LOOKS = 20
# Name and colour (from Okabe and Ito's palette, which colour-blind people can distinguish).
ARMS = {"none": ("without batch normalization", "#D55E00"), "batch": ("with batch normalization", "#0072B2")}


class Variation(NamedTuple):
    """The variation of loss and gradient along the gradient.

    Attributes:
        loss: Highest minus lowest loss.
        gradient: Largest change of the gradient.
        smoothness: Largest change of the gradient over the distance moved.
    """

    loss: float
    gradient: float
    smoothness: float


WHAT = {
    "loss": "Range of the loss",
    "gradient": "Change of the gradient",
    "smoothness": "Effective β-smoothness",
}


def cells(size: Size) -> Iterator[Cell]:
    """Yield both networks at every rate."""
    for seed in range(size.seeds):
        for rate in RATES[:2] if size.quick else RATES:
            for norm in ARMS:
                yield {"norm": norm, "rate": rate, "steps": 20 if size.quick else 600, "seed": seed}


def variation_along_gradient(network: nn.Module, x: Tensor, y: Tensor, distances: Sequence[float]) -> Variation:
    """Return the variation of loss and gradient along the gradient on one batch; the network does not change.

    Args:
        network: In training mode.
        x: A batch.
        y: Its labels.
        distances: Distances to move, as multiples of the gradient's length.
    """
    network = copy.deepcopy(network)
    parameters = list(network.parameters())
    start = [parameter.detach().clone() for parameter in parameters]

    def loss_and_gradient() -> tuple[float, list[Tensor]]:
        loss = F.cross_entropy(network(x), y)
        return loss.item(), list(torch.autograd.grad(loss, parameters))

    def length(vectors: Sequence[Tensor]) -> float:
        return math.sqrt(sum(vector.double().square().sum().item() for vector in vectors))

    _, gradient = loss_and_gradient()
    losses, changes = [], []
    for distance in distances:
        with torch.no_grad():
            for parameter, origin, direction in zip(parameters, start, gradient, strict=True):
                parameter.copy_(origin - distance * direction)
        loss, there = loss_and_gradient()
        losses.append(loss)
        changes.append(length([after - before for after, before in zip(there, gradient, strict=True)]))
    slopes = [change / (distance * length(gradient)) for change, distance in zip(changes, distances, strict=True)]
    return Variation(max(losses) - min(losses), max(changes), max(slopes))


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and measure the landscape around it during training."""
    images = half_size(*data.values())
    network = initialized_alike(vgg, cell["norm"], images, cell["seed"])
    optimizer = torch.optim.SGD(network.parameters(), lr=cell["rate"])
    distances = [multiple * cell["rate"] for multiple in MULTIPLES]
    every = cell["steps"] // LOOKS
    looks, seen = [], []
    for step, index in enumerate(islice(IID.batches(images.y_train, BATCH, cell["seed"]), cell["steps"])):
        x, y = images.x_train[index], images.y_train[index]
        if step % every == 0:
            looks.append(step)
            seen.append(variation_along_gradient(network, x, y, distances))
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy, _ = test(network, images.x_test, images.y_test)
    alive = all(math.isfinite(value) and value > 0 for look in seen for value in look)
    found: Record = {"accuracy": accuracy, "alive": alive, "looks": looks}
    for name in Variation._fields:
        values = [getattr(look, name) for look in seen]
        found[name] = statistics.geometric_mean(values) if alive else None
        found[f"{name}_by_step"] = [float(f"{value:.4g}") for value in values] if alive else None
    return found


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the ratios of roughness without over with batch normalization."""
    slow, own = best_rate(records, "none"), best_rate(records, "batch")

    def ratio(what: str, value: str, normalized: float) -> Effect:
        without = by_seed(records, value, norm="none", rate=slow)
        with_it = by_seed(records, value, norm="batch", rate=normalized)
        return Effect.ratio(what, without, with_it, worth=2)

    return [
        ratio("Effective β-smoothness without over with batch normalization, at the same rate", "smoothness", slow),
        ratio("The same for the change of the gradient", "gradient", slow),
        ratio("The same for the range of the loss", "loss", slow),
        ratio("Effective β-smoothness without over with, each at its best rate", "smoothness", own),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""
    smoothness, gradient, loss, own = effects
    slow, fast = best_rate(records, "none"), best_rate(records, "batch")
    right = {
        norm: 100 * statistics.fmean(by_seed(records, "accuracy", norm=norm, rate=best_rate(records, norm)))
        for norm in ARMS
    }
    beta = {norm: statistics.geometric_mean(by_seed(records, "smoothness", norm=norm, rate=slow)) for norm in ARMS}
    return (
        f"At the rate {slow:g}, the best rate without batch normalization, the effective β-smoothness is "
        f"{beta['none']:.1f} without batch normalization and {beta['batch']:.1f} with it, a ratio of "
        f"{smoothness.figures}. Over the same distances, the gradient changes {gradient.figures} as much without it, "
        f"and the loss varies {loss.figures} as much. Each at its best rate ({slow:g} and {fast:g}), the ratio of "
        f"β-smoothness is {own.figures}. After {records[0]['steps']} steps, each at its best rate, test accuracy is "
        f"{right['none']:.1f} % without and {right['batch']:.1f} % with batch normalization."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the three measures during training, at the same rate."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    rate, looks = best_rate(records, "none"), records[0]["looks"]
    labels = {
        "loss": "highest − lowest loss (nats)",
        "gradient": "largest ‖∇L(w − a·g) − g‖",
        "smoothness": "largest ‖∇L(w − a·g) − g‖ / ‖a·g‖",
    }
    for panel, (value, title) in zip(figure.subplots(1, 3), WHAT.items(), strict=True):
        for (norm, (name, colour)), style in zip(ARMS.items(), ("s--", "o-"), strict=True):
            rows = [row for row in by_seed(records, f"{value}_by_step", norm=norm, rate=rate) if row]
            columns = list(zip(*rows, strict=True))
            middle = [statistics.median(column) for column in columns]
            panel.plot(looks, middle, style, color=colour, label=name, markersize=5)
            panel.fill_between(looks, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set(title=title, xlabel="training step", ylabel=labels[value])
        panel.grid(alpha=0.3)
    lines, names = figure.axes[0].get_legend_handles_labels()
    described = [f"{name} (median and range of the seeds)" for name in names]
    figure.legend(lines, described, loc="outside lower center", ncols=2)
    figure.suptitle(
        "Is the loss a smoother function of the parameters with batch normalization? (lower is smoother)\n"
        f"Along the gradient, {MULTIPLES[0]:g} to {MULTIPLES[-1]:g} times as far as a training step at rate {rate:g}",
        fontsize=13,
    )
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="landscape",
        title="A smoother landscape",
        statement="Batch normalization makes the loss a smoother function of the parameters: along the gradient, loss "
        "and gradient change less.",
        source="[Santurkar et al. 2018](https://arxiv.org/abs/1805.11604), section 3.1, figure 4",
        setting="A small VGG on Fashion-MNIST at half its size, 600 steps of plain gradient descent in batches of "
        f"{BATCH} at the rates {', '.join(f'{rate:g}' for rate in RATES)}; measured at {LOOKS} steps; five seeds.",
    ),
    globals(),
    data=("fashion-mnist",),
)

if __name__ == "__main__":
    main(EXPERIMENT)
