"""Internal covariate shift by the gradient measure of Santurkar et al., without, with, and with noisy normalization.

Claim: the benefit of batch normalization does not come from less internal covariate shift. When the layers below a
layer take their step, the layer's gradient changes at least as much with batch normalization as without it. And with
noise after each normalization, which moves the distributions at every step, a network still trains better than one
without batch normalization (Santurkar et al. 2018, section 2).

Test: the comparison's small VGG (six convolutions, two linear layers) trains on Fashion-MNIST at half its size by plain
stochastic gradient descent. At 15 steps, the shift of layer k is measured as ‖G − G′‖₂ (their definition 2.1). G is the
gradient of the loss with respect to the weights of layer k. G′ is the same on the same batch, after all parameters
below layer k have taken their training step; layer k and the layers above it stay as they are. The result is the
geometric mean over the second to the last layer and all 15 steps. The shift relative to the length of G, and the cosine
between G and G′, are measured as well. At each step, the noise gives each channel a shift from −0.5 to 0.5 and a scale
from 1 to 1.25, and gives each sample values close to these. A layer sees new noise at the next step, so the noise of G′
differs from that of G.

The test is fair because all networks have the same initial weights (He's initialization), see the same batches in the
same order, and train at the same four rates. The shift grows with the rate, so the networks are compared at one rate:
the rate at which the network without normalization is most accurate. They are also compared each at its own best rate.
Accuracy is measured on the last 100 batches, each classified in training mode before the network learns from it. No
image is seen twice, so these images are new to the network; the network with noise is tested under the noise that it
trained with.

Seen: the shift is larger with batch normalization than without. Not seen: it is smaller.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, best_rate, by_seed, main
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from network import half_size, initialized_alike
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm.compare import Data
from batchnorm.compare.inputs.networks import vgg
from batchnorm.compare.inputs.sampling import IID

RATES = (0.03, 0.1, 0.3, 1.0)
BATCH = 64
LOOKS = 15
LAST = 100  # batches in which accuracy is measured
# Name and colour (from Okabe and Ito's palette, which colour-blind people can distinguish).
ARMS = {
    "none": ("without batch normalization", "#D55E00"),
    "batch": ("with batch normalization", "#0072B2"),
    "noisy": ("with it, and noise after it", "#009E73"),
}


class Noise(nn.Module):
    """Random shift and scale of each channel, drawn anew for each batch, with small variations between samples."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with noise in training mode, and unchanged in evaluation mode."""
        if not self.training:
            return x
        shift = torch.rand(x.shape[1]) - 0.5 + 0.1 * (2 * torch.rand(x.shape[:2]) - 1)
        scale = 1 + 0.25 * torch.rand(x.shape[1]) + 0.1 * torch.randn(x.shape[:2])
        ones = [1] * (x.dim() - 2)
        return x * scale.view(*scale.shape, *ones) + shift.view(*shift.shape, *ones)


def cells(size: Size) -> Iterator[Cell]:
    """Yield every network at every rate."""
    for seed in range(size.seeds):
        for rate in RATES[:2] if size.quick else RATES:
            for norm in ARMS:
                yield {"norm": norm, "rate": rate, "steps": 15 if size.quick else 450, "seed": seed}


def build(norm: str, data: Data, seed: int) -> nn.Module:
    """Return the network; its initial weights are the same in all arms."""
    network = initialized_alike(vgg, norm.replace("noisy", "batch"), data, seed)
    if norm == "noisy":
        for part in network.children():
            if isinstance(part, nn.Sequential):
                part.norm = nn.Sequential(part.norm, Noise())
    return network


def shifts(network: nn.Module, x: Tensor, y: Tensor, rate: float) -> list[tuple[float, float, float]]:
    """Return the internal covariate shift of each layer but the first; the network does not change.

    Args:
        network: The network; its convolutions and linear layers must be registered in the order of their calls.
        x: A batch.
        y: Its labels.
        rate: Learning rate of the step that the layers below take.

    Returns:
        For each layer ‖G − G′‖, ‖G‖, and the cosine between G and G′.
    """
    network = copy.deepcopy(network)
    parameters = list(network.parameters())
    before = torch.autograd.grad(F.cross_entropy(network(x), y), parameters)
    found = []
    moved = 0
    for module in network.modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        place = next(number for number, parameter in enumerate(parameters) if parameter is module.weight)
        with torch.no_grad():
            for parameter, gradient in zip(parameters[moved:place], before[moved:place], strict=True):
                parameter -= rate * gradient
        moved = place
        if place:
            (after,) = torch.autograd.grad(F.cross_entropy(network(x), y), module.weight)
            first, second = before[place].double().flatten(), after.double().flatten()
            cosine = torch.dot(first, second) / (first.norm() * second.norm())
            found.append(((first - second).norm().item(), first.norm().item(), cosine.item()))
    return found


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network, and return its accuracy and its shift at each measured step, averaged over the layers."""
    images = half_size(*data.values())
    network = build(cell["norm"], images, cell["seed"])
    optimizer = torch.optim.SGD(network.parameters(), lr=cell["rate"])
    looks, right = [], []
    every = cell["steps"] // LOOKS
    for step, index in enumerate(islice(IID.batches(images.y_train, BATCH, cell["seed"]), cell["steps"])):
        x, y = images.x_train[index], images.y_train[index]
        if step % every == 0:
            looks.append((step, shifts(network, x, y, cell["rate"])))
        scores = network(x)
        right.append((scores.argmax(1) == y).double().mean().item())
        optimizer.zero_grad()
        F.cross_entropy(scores, y).backward()
        optimizer.step()
    numbers = torch.tensor([layers for _, layers in looks])  # looks, layers, measures
    change, length, cosine = numbers.unbind(-1)
    alive = bool(numbers.isfinite().all() and (change > 0).all() and (length > 0).all())
    return {
        "accuracy": statistics.fmean(right[-LAST:]),
        "alive": alive,
        "shift": change.log().mean().exp().item() if alive else None,
        "relative": (change / length).log().mean().exp().item() if alive else None,
        "looks": [step for step, _ in looks],
        "shifts": [float(f"{value:.4g}") for value in change.log().mean(1).exp().tolist()] if alive else None,
        "cosines": [round(value, 4) for value in cosine.mean(1).tolist()] if alive else None,
    }


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the ratios of shift, and the difference in accuracy."""
    best = {norm: best_rate(records, norm) for norm in ARMS}
    same = dict.fromkeys(ARMS, best["none"])

    def ratio(what: str, value: str, norm: str, rates: Mapping[str, float]) -> Effect:
        above = by_seed(records, value, norm=norm, rate=rates[norm])
        below = by_seed(records, value, norm="none", rate=rates["none"])
        return Effect.ratio(what, above, below, worth=1)

    noisy, plain = (
        [100 * value for value in by_seed(records, "accuracy", norm=norm, rate=best[norm])]
        for norm in ("noisy", "none")
    )
    return [
        ratio("Shift with batch normalization over shift without, at the same rate", "shift", "batch", same),
        ratio("The same relative to the length of the gradient", "relative", "batch", same),
        ratio("The same, each at its best rate", "shift", "batch", best),
        ratio(
            "Shift with noise after batch normalization over shift without either, at the same rate",
            "shift",
            "noisy",
            same,
        ),
        Effect.difference(
            "Accuracy with batch normalization and noise minus accuracy without either, each at its best rate",
            noisy,
            plain,
            worth=0.5,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""
    shift, relative, own, noisy, _ = effects
    best = {norm: best_rate(records, norm) for norm in ARMS}
    right = {
        norm: 100 * statistics.fmean(by_seed(records, "accuracy", norm=norm, rate=rate)) for norm, rate in best.items()
    }
    cosines = {norm: by_seed(records, "cosines", norm=norm, rate=best["none"]) for norm in ("none", "batch")}
    cosine = {norm: statistics.fmean(map(statistics.fmean, rows)) for norm, rows in cosines.items()}
    return (
        f"When the layers below take their step at the rate {best['none']:g}, a layer's gradient changes "
        f"{shift.figures} as much with batch normalization as without it, and {relative.figures} as much relative to "
        f"its length. The cosine between the gradients before and after is {cosine['batch']:.2f} with and "
        f"{cosine['none']:.2f} without batch normalization. Each at its best rate ({best['batch']:g} and "
        f"{best['none']:g}), the gradient changes {own.figures} as much. With noise after batch normalization, it "
        f"changes {noisy.figures} as much as without either. After {records[0]['steps']} steps, each at its best rate, "
        f"accuracy is {right['none']:.1f} % without batch normalization, {right['batch']:.1f} % with it, and "
        f"{right['noisy']:.1f} % with noise after it."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw shift and cosine during training, and the accuracy."""
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
    rate = best_rate(records, "none")
    for place, (norm, (name, colour)) in enumerate(ARMS.items()):
        looks = records[0]["looks"]
        for panel, value in ((left, "shifts"), (middle, "cosines")):
            rows = [row for row in by_seed(records, value, norm=norm, rate=rate) if row]
            columns = list(zip(*rows, strict=True))
            style = ("s--", "o-", "^:")[place]
            panel.plot(looks, [statistics.median(column) for column in columns], style, color=colour, label=name)
            panel.fill_between(looks, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15)
        values = [100 * value for value in by_seed(records, "accuracy", norm=norm, rate=best_rate(records, norm))]
        right.plot([place] * len(values), values, "os^"[place], color=colour, alpha=0.6)
        right.plot([place - 0.25, place + 0.25], [statistics.fmean(values)] * 2, color=colour, linewidth=2)
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set(title="Change of a layer's gradient\nwhen the layers below step", ylabel="‖G − G′‖, mean over the layers")
    middle.set(title="Its direction before and after\n(1: the same, 0: unrelated)", ylabel="cosine between G and G′")
    for panel in (left, middle):
        panel.set_xlabel(f"training step (learning rate {rate:g})")
        panel.grid(alpha=0.3)
    right.set_xticks(range(len(ARMS)), ["without", "with", "with, and\nnoise"])
    right.set_xlim(-0.6, len(ARMS) - 0.4)
    right.set(
        title="Accuracy\n(each at its best rate; line: mean)",
        ylabel=f"accuracy, last {LAST} batches (%)",
    )
    right.grid(alpha=0.3, axis="y")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        "Does a layer's gradient change less with batch normalization while the layers below learn?\n"
        "(lines: median of the seeds; shaded: their range)",
        fontsize=13,
    )
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="covariate_shift",
        title="Internal covariate shift",
        statement="Batch normalization does not reduce internal covariate shift: a layer's gradient changes as much, "
        "or more, when the layers below take their step.",
        source="[Santurkar et al. 2018](https://arxiv.org/abs/1805.11604), section 2",
        setting="A small VGG on Fashion-MNIST at half its size, 450 steps of plain gradient descent in batches of "
        f"{BATCH} at the rates {', '.join(f'{rate:g}' for rate in RATES)}; without batch normalization, with it, and "
        "with noise after it; five seeds.",
    ),
    globals(),
    data=("fashion-mnist",),
)

if __name__ == "__main__":
    main(EXPERIMENT)
