"""Faster and higher: steps to a given accuracy with and without batch normalization, over a range of learning rates.

Claim: a network with batch normalization tolerates much higher learning rates and needs far fewer steps (Ioffe &
Szegedy 2015, section 4.2.2: the same accuracy in less than half the steps at the same rate, and in 14 times fewer at 5
times the rate, where the network without it no longer trains).

Test: a network of five convolutions trains on MNIST by plain stochastic gradient descent at a constant rate until it
classifies 95 % of 1,000 test images correctly. The rates form a grid with a factor of two between neighbours. Its ends
are beyond the rates that either network can use.

The test is fair because both networks have the same initial weights (He's initialization, with which a network of this
depth also trains well without normalization), see the same batches in the same order, and choose from the same rates. A
pilot run with another seed fixed an accuracy and a number of steps that both networks can reach.

Seen: at its own best rate, the network without batch normalization needs at least twice the steps. As a separate
effect, the largest rate that still trains grows by the paper's factor of five.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, main
from matplotlib.figure import Figure
from network import test
from torch import nn
from torch.nn import functional as F

from batchnorm.compare import Data
from batchnorm.compare.inputs.sampling import IID
from batchnorm.nn import BatchNorm2d

RATES = tuple(0.02 * 2**power for power in range(11))
STEPS = 600  # limit for reaching the accuracy
EVERY = 5  # steps from one test to the next
TEST = 1000
BATCH = 64
# Name and colour (from Okabe and Ito's palette, which colour-blind people can distinguish).
ARMS = {"none": ("without batch normalization", "#D55E00"), "batch": ("with batch normalization", "#0072B2")}


def cells(size: Size) -> Iterator[Cell]:
    """Yield every network at every rate."""
    target, steps, rates = (0.3, 20, RATES[2:5]) if size.quick else (0.95, STEPS, RATES)
    for seed in range(size.seeds):
        for rate in rates:
            for norm in ARMS:
                yield {"norm": norm, "rate": rate, "target": target, "steps": steps, "seed": seed}


def build(norm: str, num_classes: int, seed: int) -> nn.Sequential:
    """Return five convolutions and a linear layer.

    Args:
        norm: `batch`, or `none`.
        num_classes: Number of outputs.
        seed: Decides the initial weights, which are the same for both.
    """
    layers: list[nn.Module] = []
    before = 1
    for after, stride in ((8, 2), (8, 1), (16, 2), (16, 1), (32, 2)):
        layers.append(nn.Conv2d(before, after, 3, stride, 1, bias=norm == "none"))
        layers += [BatchNorm2d(after)] if norm == "batch" else []
        layers.append(nn.ReLU())
        before = after
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(before * 4 * 4, num_classes))
    torch.manual_seed(seed)
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one network until it is accurate enough, diverges, or reaches the limit of steps."""
    (images,) = data.values()
    model = build(cell["norm"], images.num_classes, cell["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=cell["rate"])
    batches = IID.batches(images.y_train, BATCH, cell["seed"])
    x, y = images.x_test[:TEST], images.y_test[:TEST]
    best = 0.0
    for step in range(1, cell["steps"] + 1):
        index = next(batches)
        loss = F.cross_entropy(model(images.x_train[index]), images.y_train[index])
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            accuracy, _ = test(model, x, y)
            best = max(best, accuracy)
            if accuracy >= cell["target"]:
                return {"reached": step, "accuracy": best}
    return {"reached": None, "accuracy": best}


def reached(records: Sequence[Record], norm: str) -> dict[float, list[int | None]]:
    """Return, by rate, the steps that each seed needed to reach the accuracy; None if it never did."""
    found: dict[float, list[int | None]] = {}
    for record in sorted(records, key=lambda record: (record["rate"], record["seed"])):
        if record["norm"] == norm:
            found.setdefault(record["rate"], []).append(record["reached"])
    return found


def best_rate(records: Sequence[Record], norm: str) -> float:
    """Return the rate with the fewest steps, among the rates at which all seeds reach the accuracy."""
    complete = {rate: steps for rate, steps in reached(records, norm).items() if None not in steps}
    if not complete:
        raise ValueError(f"every network with norm {norm!r} must reach the accuracy at some rate; allow more steps")
    return min(complete, key=lambda rate: statistics.geometric_mean(complete[rate]))


def largest(records: Sequence[Record], norm: str) -> list[float]:
    """Return, for each seed, the largest rate at which it reaches the accuracy."""
    table = reached(records, norm)
    seeds = range(len(next(iter(table.values()))))
    return [max(rate for rate, steps in table.items() if steps[seed] is not None) for seed in seeds]


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the ratios of steps and of largest rates."""
    plain, normalized = reached(records, "none"), reached(records, "batch")
    own, slow = best_rate(records, "batch"), best_rate(records, "none")
    limit = records[0]["steps"]
    same = [steps or limit for steps in normalized[slow]]  # the limit, where it never reached the accuracy
    return [
        Effect.ratio(
            "Steps without over steps with batch normalization, each at its best rate",
            plain[slow],
            normalized[own],
            worth=2,
        ),
        Effect.ratio(
            "Largest rate that still trains, with over without batch normalization",
            largest(records, "batch"),
            largest(records, "none"),
            worth=5,
        ),
        Effect.ratio(
            "Steps without over steps with batch normalization, both at the best rate of the network without it",
            plain[slow],
            same,
            worth=2,
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""
    target, limit = records[0]["target"], records[0]["steps"]
    parts = []
    for norm, (name, _) in ARMS.items():
        rate = best_rate(records, norm)
        steps = statistics.geometric_mean(reached(records, norm)[rate])
        high = largest(records, norm)
        ends = f"{min(high):g}" if min(high) == max(high) else f"{min(high):g} to {max(high):g}, depending on the seed"
        parts.append(
            f"The network {name} was fastest at rate {rate:g}: it classified {100 * target:.0f} % of the test images "
            f"correctly after {steps:.0f} steps. The largest rate at which it reached this within {limit} steps was "
            f"{ends}."
        )
    faster, higher, same = effects
    return (
        " ".join(parts) + f" Each at its best rate, the network without batch normalization needed {faster.figures} as "
        f"many steps as the network with it. The largest rate with it was {higher.figures} the largest rate without. "
        f"With both at the best rate of the network without it, that network needed {same.figures} as many steps."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the steps against the rate; networks that never reached the accuracy are above the line at the top."""
    figure = Figure(figsize=(8.5, 5.8), layout="constrained")
    panel = figure.subplots()
    limit = records[0]["steps"]
    never = limit * 1.45
    for place, (norm, (name, colour)) in enumerate(ARMS.items()):
        table = reached(records, norm)
        medians = []
        for rate, steps in table.items():
            shown = [never if step is None else step for step in steps]
            medians.append(statistics.median(shown))
            aside = rate * (0.97, 1.03)[place]
            panel.plot([aside] * len(shown), shown, ".", color=colour, alpha=0.55, markersize=7)
        panel.plot(list(table), medians, "o-" if norm == "batch" else "s--", color=colour, label=name, markersize=6)
    panel.axhline(limit * 1.12, color="#777777", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = [tick for tick in (10, 20, 50, 100, 200, 300, 500) if tick <= limit]
    panel.set_yticks([*ticks, never], [*map(str, ticks), f"not within\n{limit} steps"])
    rates = sorted({record["rate"] for record in records})
    panel.set_xticks(rates[::2], [f"{rate:g}" for rate in rates[::2]])
    panel.minorticks_off()
    panel.set_ylim(bottom=min(record["reached"] or limit for record in records) / 2, top=never * 1.15)
    target = records[0]["target"]
    panel.set(
        title="Does batch normalization allow higher learning rates, and does training then take fewer steps?",
        xlabel="learning rate (plain stochastic gradient descent, constant)",
        ylabel=f"steps of {BATCH} images until {100 * target:.0f} % of the test images are correct",
    )
    panel.title.set_fontsize(11)
    panel.grid(alpha=0.3)
    panel.legend(loc="lower left", frameon=False, title="line: median over the seeds; dots: each seed")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="learning_rate",
        title="Faster, and at higher rates",
        statement="With batch normalization, a network trains at much higher learning rates, and reaches the same "
        "accuracy in a fraction of the steps.",
        source="[Ioffe & Szegedy 2015](https://arxiv.org/abs/1502.03167), section 4.2",
        setting="Five convolutions with He's initialization, trained on MNIST by plain gradient descent in batches of "
        f"{BATCH} until 95 % of {TEST:,} test images are correct, at most {STEPS} steps; {len(RATES)} rates from "
        f"{RATES[0]:g} to {RATES[-1]:g}, five seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
