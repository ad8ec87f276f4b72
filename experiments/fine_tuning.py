"""Fine-tuning on a small, shifted data set: batch normalization live, frozen, or half frozen.

    python experiments/fine_tuning.py --data-dir FOLDER

The claim (common practice, as in Wu & He 2018, section 4.2): if memory allows only small batches in fine-tuning, frozen
batch normalization, with the statistics and parameters of pretraining, is better than live batch normalization.

Test: a network learns MNIST. It is then fine-tuned on 256 images that are rotated by 45° or inverted, in batches of 2
and of 16. All weights outside batch normalization are trained. The batch normalization is

- live: batch statistics in training, running statistics that move, γ and β trained;
- frozen: running statistics of pretraining also in training, γ and β fixed (`freeze(model)`);
- half frozen: γ and β trained, statistics fixed (`freeze(model, trainable_affine=True)`);
- half frozen the other way: γ and β fixed, batch statistics in training, running statistics that move.

The test is fair because all four start from the same trained network, and see the same batches in the same order. Each
trains at five learning rates, and is tested at the rate that is best on 1,000 other shifted images. The momentum of the
running statistics is the default, 0.1; its cost is measured by recomputing the statistics of the live network at the
end.

Seen: at batches of 2, over both shifts, live makes at least a tenth more test errors than frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from statistics import fmean, stdev

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.figure import Figure
from network import small_cnn, test, train_to_rest
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import BatchNorm2d, freeze, recalibrate
from batchnorm.compare import Data

ARMS = {  # name, colour, and marker
    "live": ("live", "#D55E00", "o"),
    "statistics": ("statistics move, γ and β fixed", "#E69F00", "v"),
    "parameters": ("statistics fixed, γ and β trained", "#56B4E9", "^"),
    "frozen": ("frozen", "#0072B2", "s"),
}
SHIFTS = {"turned": "rotated by 45°", "inverted": "inverted"}
RATES = {2: (0.0003, 0.001, 0.003, 0.01, 0.03), 16: (0.001, 0.003, 0.01, 0.03, 0.1)}  # by batch size
TUNED, HELD_OUT = 256, 1_000


def cells(size: Size) -> Iterator[Cell]:
    """Yield each arm on each shift at each batch size, and the network without fine-tuning."""
    pretrained, epochs = (640, 1) if size.quick else (50_000, 20) if size.full else (8_000, 5)
    for seed in range(size.seeds):
        shared = {"seed": seed, "pretrained": pretrained, "epochs": epochs}
        for shift in SHIFTS:
            yield {"arm": "as it is", "shift": shift, "batch": 0, **shared}
            for batch in RATES:
                for arm in ARMS:
                    yield {"arm": arm, "shift": shift, "batch": batch, **shared}


def shifted(x: Tensor, shift: str) -> Tensor:
    """Return images `[N, 1, H, W]`, rotated by 45° (new corners are dark) or inverted."""
    dark, light = x.min(), x.max()
    if shift == "inverted":
        return dark + light - x
    turn = torch.full((len(x),), torch.pi / 4)
    zero = torch.zeros_like(turn)
    rows = [turn.cos(), -turn.sin(), zero, turn.sin(), turn.cos(), zero]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return dark + F.grid_sample(x - dark, grid, align_corners=False)


_PRETRAINED: dict[tuple[int, int], nn.Module] = {}  # of this process, by seed and number of images


def pretrained(data: Data, order: Tensor, seed: int) -> nn.Module:
    """Return a copy of the network that has learned the images in `order`, in three epochs."""
    key = seed, len(order)
    if key not in _PRETRAINED:
        torch.manual_seed(seed)
        model = small_cnn(BatchNorm2d, data)
        x, y = data.x_train[order], data.y_train[order]
        train_to_rest(model, x, y, rate=0.1, batch_size=64, steps=3 * len(order) // 64, seed=seed)
        _PRETRAINED[key] = model
    return deepcopy(_PRETRAINED[key])


def prepared(model: nn.Module, arm: str) -> nn.Module:
    """Return the network with the batch normalization of the arm."""
    if arm in ("frozen", "parameters"):
        return freeze(model, trainable_affine=arm == "parameters", inplace=True).model
    if arm == "statistics":
        for layer in model.modules():
            if isinstance(layer, BatchNorm2d):
                layer.requires_grad_(False)
    return model


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Fine-tune one arm at each rate, and test it at the best rate."""
    mnist, arm, seed, count = data["mnist"], cell["arm"], cell["seed"], cell["pretrained"]
    order = torch.randperm(len(mnist.x_train), generator=torch.Generator().manual_seed(seed))
    first, tuned, held_out = order[: count + TUNED + HELD_OUT].split([count, TUNED, HELD_OUT])
    x, x_held_out, x_test = (
        shifted(images, cell["shift"]) for images in (mnist.x_train[tuned], mnist.x_train[held_out], mnist.x_test)
    )

    def wrong(model: nn.Module) -> float:
        return 100 * (1 - test(model, x_test, mnist.y_test)[0])

    if arm == "as it is":
        return {"wrong": wrong(pretrained(mnist, first, seed))}
    models, by_rate = [], []
    for rate in RATES[cell["batch"]]:
        model = prepared(pretrained(mnist, first, seed), arm)
        steps = cell["epochs"] * TUNED // cell["batch"]
        train_to_rest(model, x, mnist.y_train[tuned], rate=rate, batch_size=cell["batch"], steps=steps, seed=seed)
        models.append(model)
        by_rate.append(100 * (1 - test(model, x_held_out, mnist.y_train[held_out])[0]))
    best = by_rate.index(min(by_rate))
    found: Record = {"rate": RATES[cell["batch"]][best], "held_out": by_rate, "wrong": wrong(models[best])}
    if arm == "live":
        found["recalibrated"] = wrong(recalibrate(models[best], [x], inplace=True).model)
    return found


def times(records: Sequence[Record], batch: int, shift: str, value: str = "wrong", over: str = "frozen") -> list[float]:
    """Return, for each seed, the errors of live batch normalization over a value of another arm."""
    live = by_seed(records, "wrong", arm="live", shift=shift, batch=batch)
    return [a / b for a, b in zip(live, by_seed(records, value, arm=over, shift=shift, batch=batch), strict=True)]


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the cost of live normalization: over both shifts, on each, at larger batches, by running statistics."""
    turned, inverted = (times(records, 2, shift) for shift in SHIFTS)
    both = [(a * b) ** 0.5 for a, b in zip(turned, inverted, strict=True)]
    what = "Test errors of live over those of frozen batch normalization"
    return [
        Effect.over(f"{what}, batches of 2, geometric mean of both shifts", both, unit="×", worth=1.1),
        *(
            Effect.over(f"{what}, batches of {batch}, {name}", times(records, batch, shift), unit="×", worth=1.1)
            for batch in RATES
            for shift, name in SHIFTS.items()
        ),
        *(
            Effect.over(
                f"Test errors of live over those with its statistics recomputed at the end, batches of 2, {name}",
                times(records, 2, shift, "recalibrated", "live"),
                unit="×",
                worth=1.1,
            )
            for shift, name in SHIFTS.items()
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def mean(arm: str, shift: str, batch: int, value: str = "wrong") -> str:
        return f"{fmean(by_seed(records, value, arm=arm, shift=shift, batch=batch)):.1f}"

    def row(shift: str, batch: int) -> str:
        live, statistics, parameters, frozen = (mean(arm, shift, batch) for arm in ARMS)
        return (
            f"{live} % wrong labels live, {frozen} % frozen, {parameters} % with fixed statistics but trained γ and β, "
            f"and {statistics} % with moving statistics but fixed γ and β"
        )

    return (
        f"On images rotated by 45°, batches of 2 gave {row('turned', 2)}; before fine-tuning, "
        f"{mean('as it is', 'turned', 0)} % were wrong. "
        f"On inverted images, they gave {row('inverted', 2)}; before fine-tuning, "
        f"{mean('as it is', 'inverted', 0)} %. "
        f"With the running statistics recomputed at the end, live gave {mean('live', 'turned', 2, 'recalibrated')} % "
        f"and {mean('live', 'inverted', 2, 'recalibrated')} %. "
        f"In batches of 16, live and frozen gave {mean('live', 'turned', 16)} % and {mean('frozen', 'turned', 16)} % "
        f"on rotated images, and {mean('live', 'inverted', 16)} % and {mean('frozen', 'inverted', 16)} % on inverted "
        "images."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the errors of each arm by batch size, for each shift."""
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, (shift, title) in zip(panels, SHIFTS.items(), strict=True):
        for number, (arm, (name, colour, marker)) in enumerate(ARMS.items()):
            for group, batch in enumerate(RATES):
                values = by_seed(records, "wrong", arm=arm, shift=shift, batch=batch)
                place = group + 0.18 * (number - 1.5)
                label = name if group == 0 else None
                seeds = [place + 0.02 * (seed - (len(values) - 1) / 2) for seed in range(len(values))]
                panel.scatter(seeds, values, s=14, color=colour, alpha=0.5)
                panel.errorbar(
                    place,
                    fmean(values),
                    stdev(values),
                    color=colour,
                    marker=marker,
                    markersize=8,
                    capsize=3,
                    label=label,
                )
        before = fmean(by_seed(records, "wrong", arm="as it is", shift=shift))
        panel.set_xticks(range(len(RATES)), [f"batches of {batch}" for batch in RATES])
        panel.set_xlim(-0.5, len(RATES) - 0.5)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{title[0].upper()}{title[1:]} ({before:.0f} % wrong before fine-tuning)")
        panel.set_xlabel("images in a batch of fine-tuning")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("wrong labels on shifted test images (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        "Should batch normalization be frozen in fine-tuning on few images? (mean and deviation over seeds)"
    )
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="fine_tuning",
        title="Fine-tuning with frozen batch normalization",
        statement="In fine-tuning with small batches, a network is more accurate with frozen batch normalization than "
        "with live batch normalization.",
        source="[Wu & He 2018](https://arxiv.org/abs/1803.08494)",
        setting="Three 3×3 convolutions (8, 16 and 32 channels, each normalized, ReLU) and a linear layer learn 8,000 "
        "images of MNIST in 3 epochs; then all weights are fine-tuned on 256 images that are rotated by 45° or "
        "inverted, 5 epochs, SGD with momentum 0.9, the best of 5 learning rates for each, decaying to 0; all 10,000 "
        "test images, with the same shift; 5 seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
