"""Leakage: can a network learn labels from the batch statistics, and how accurate is it then in evaluation?

    python experiments/leakage.py --data-dir FOLDER

The claim (He, Fan, Wu, Xie & Girshick 2020; Wu & Johnson 2021): if labels depend on the composition of a batch, batch
statistics carry them from sample to sample. The network learns to read the labels from the statistics instead of the
sample, looks accurate in training mode, and fails in evaluation, where each sample is processed alone. Statistics over
samples that do not belong together, or over a single sample, remove the leak.

Test: "odd one out". A group of 32 images has its own digit, drawn anew each time: 16 images show it, 16 show other
digits, and the network decides for each image whether it is odd. Each digit is odd as often as not, so an image alone
contains no information ("blind": no method beats 50 % on single images). In a second task, the image contains some
information: its contrast is drawn from 0.6 to 1 if it belongs to the group and from 0.4 to 0.8 if it is odd, which
allows at most 75 % ("cued").

Each step has four groups. The arms differ only in the samples whose statistics normalize an image:

- "group": its own group, as on a device that processes one group (`GhostBatchNorm1d(C, ghost_size=32)`);
- "shuffled": 32 images from all four groups, drawn anew at each step (the solution of He et al.);
- "synchronized": all four groups, as in `SyncBatchNorm` on four devices (`BatchNorm1d`);
- "none of the batch": no other sample; groups of the image's own channels are normalized (`torch.nn.GroupNorm`).

Training mode is tested on groups of test images, evaluation on the same images with running statistics.

The test is fair because all arms of a seed have the same groups in the same order, start from the same values, and
train at the same rate. The information in a single image is known exactly, so the leak is measured and not estimated.

Seen: accuracy on the blind task is at least 10 points higher in training mode than in evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from statistics import fmean

import torch
from claim import Cell, Claim, Effect, Experiment, Record, Size, by_seed, main
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from batchnorm import BatchNorm1d, GhostBatchNorm1d
from batchnorm.compare import Data

GROUP = 32
GROUPS = 4  # in a step
ALONE = {"blind": 50, "cued": 75}  # highest accuracy in percent from an image alone
ARMS = {
    "group": "its own group\n(BatchNorm)",
    "shuffled": "as many images\nof four groups\n(shuffled)",
    "synchronized": "all four groups\n(synchronized)",
    "channels": "the image alone\n(GroupNorm)",
}
CUED = (0.6, 0.4)  # least contrast of an image that belongs, and of an odd one; the largest is 0.4 more
MODES = {  # name, colour, marker, and offset of its seeds from the arm's place
    "train": ("training mode", "#D55E00", "o", -0.08),
    "eval": ("evaluation", "#0072B2", "D", 0.08),
}


def cells(size: Size) -> Iterator[Cell]:
    """Yield each arm on both tasks."""
    steps, tested = (10, 5) if size.quick else (5_000, 80) if size.full else (1_000, 80)
    for seed in range(size.seeds):
        for task in ("blind", "cued"):
            for arm in ARMS:
                yield {"task": task, "arm": arm, "seed": seed, "steps": steps, "tested": tested}


class Groups:
    """Random groups of images, each with its own digit.

    Args:
        x: Images `[N, 1, H, W]`.
        y: Their digits `[N]`.
        cued: Whether the contrast contains information on an image's label.
        seed: Decides all groups.
    """

    def __init__(self, x: Tensor, y: Tensor, *, cued: bool, seed: int) -> None:
        self.x, self.cued = x, cued
        self.generator = torch.Generator().manual_seed(seed)
        self.of_digit = [(y == digit).nonzero().flatten() for digit in range(10)]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the images of `count` groups, one group after another, `[count·32, 1, H, W]`, and which are odd."""
        odd = (torch.arange(GROUP) % 2).bool().repeat(count)
        own = torch.randint(10, (count,), generator=self.generator).repeat_interleave(GROUP)
        others = (own + torch.randint(1, 10, (len(own),), generator=self.generator)) % 10
        digits = torch.where(odd, others, own)
        places = torch.empty_like(digits)
        for digit, images in enumerate(self.of_digit):
            shown = digits == digit
            places[shown] = images[torch.randint(len(images), (int(shown.sum()),), generator=self.generator)]
        images = self.x[places]
        if self.cued:
            least = torch.where(odd, CUED[1], CUED[0])
            contrast = least + 0.4 * torch.rand(len(least), generator=self.generator)
            dark = self.x.min()
            images = dark + contrast.view(-1, 1, 1, 1) * (images - dark)
        return images, odd


def network(arm: str, in_features: int) -> nn.Sequential:
    """Return a perceptron with three normalized hidden layers, and one output: the log-odds that an image is odd."""

    def norm(features: int) -> nn.Module:
        if arm == "channels":
            return nn.GroupNorm(8, features)
        return BatchNorm1d(features) if arm == "synchronized" else GhostBatchNorm1d(features, ghost_size=GROUP)

    layers: list[nn.Module] = [nn.Flatten()]
    before = in_features
    for after in (256, 128, 128):
        layers += [nn.Linear(before, after, bias=False), norm(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Linear(before, 1))


def scores(model: nn.Module, arm: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """Return the log-odds `[N]`; the arm "shuffled" mixes the images of all groups."""
    if arm != "shuffled":
        return model(x).squeeze(1)
    order = torch.randperm(len(x), generator=generator)
    return model(x[order]).squeeze(1)[order.argsort()]


def train(model: nn.Module, arm: str, groups: Groups, steps: int, seed: int) -> None:
    """Train a network by SGD with momentum 0.9 at a rate that decays from 0.1 to zero."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, odd = groups.draw(GROUPS)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(scores(model, arm, x, generator), odd.float()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, arm: str, groups: Groups, *, training: bool, steps: int) -> float:
    """Return the accuracy in percent, with the statistics of the batch or the running statistics."""
    model = deepcopy(model).train(training)  # a copy, as its running statistics may move
    generator = torch.Generator().manual_seed(0)
    right = 0
    for _ in range(steps):
        x, odd = groups.draw(GROUPS)
        right += int(((scores(model, arm, x, generator) > 0) == odd).sum())
    return 100 * right / (steps * GROUPS * GROUP)


def measure(cell: Cell, data: Mapping[str, Data]) -> Record:
    """Train one arm, and test it in both modes on the same groups."""
    mnist, arm, seed, cued = data["mnist"], cell["arm"], cell["seed"], cell["task"] == "cued"
    model = network(arm, mnist.x_train[0].numel())
    train(model, arm, Groups(mnist.x_train, mnist.y_train, cued=cued, seed=seed), cell["steps"], seed)
    tested = {mode: Groups(mnist.x_test, mnist.y_test, cued=cued, seed=seed + 1_000) for mode in MODES}
    return {
        mode: accuracy(model, arm, groups, training=mode == "train", steps=cell["tested"])
        for mode, groups in tested.items()
    }


def effects(records: Sequence[Record]) -> list[Effect]:
    """Return the size of the leak, its cost, and how much of it shuffling and synchronizing remove."""

    def difference(what: str, task: str, more: tuple[str, str], less: tuple[str, str]) -> Effect:
        pair = (by_seed(records, mode, task=task, arm=arm) for arm, mode in (more, less))
        return Effect.difference(what, *pair, worth=10)

    return [
        difference(
            "Accuracy in training mode minus accuracy in evaluation, blind task",
            "blind",
            ("group", "train"),
            ("group", "eval"),
        ),
        difference(
            "Accuracy in evaluation with GroupNorm minus accuracy with each group's own statistics, cued task",
            "cued",
            ("channels", "eval"),
            ("group", "eval"),
        ),
        *(
            difference(
                f"Accuracy in training mode with each group's own statistics minus accuracy with {what}, blind task",
                "blind",
                ("group", "train"),
                (arm, "train"),
            )
            for arm, what in (("shuffled", "shuffled groups"), ("synchronized", "statistics of four groups"))
        ),
    ]


def found(records: Sequence[Record], effects: Sequence[Effect]) -> str:
    """Return the results in sentences."""

    def mean(task: str, arm: str, mode: str) -> str:
        return f"{fmean(by_seed(records, mode, task=task, arm=arm)):.1f} %"

    return (
        f"On the blind task, where an image alone contains no information and guessing gives 50 %, a network "
        f"normalized by each group's own statistics was {mean('blind', 'group', 'train')} accurate in training mode "
        f"and {mean('blind', 'group', 'eval')} in evaluation. "
        f"In training mode, accuracy was {mean('blind', 'shuffled', 'train')} with shuffled groups, "
        f"{mean('blind', 'synchronized', 'train')} with the statistics of four groups together, and "
        f"{mean('blind', 'channels', 'train')} with GroupNorm. "
        f"On the cued task, where an image alone allows 75 %, accuracy in evaluation was "
        f"{mean('cued', 'group', 'eval')} with each group's own statistics, {mean('cued', 'shuffled', 'eval')} with "
        f"shuffled groups, {mean('cued', 'synchronized', 'eval')} with four groups together, and "
        f"{mean('cued', 'channels', 'eval')} with GroupNorm."
    )


def draw(records: Sequence[Record]) -> Figure:
    """Draw the accuracy of each arm in both modes, for both tasks."""
    figure = Figure(figsize=(11, 5.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"blind": "Blind: an image alone contains no information", "cued": "Cued: an image alone contains some"}
    for panel, (task, title) in zip(panels, titles.items(), strict=True):
        panel.axhline(
            ALONE[task], color="#777777", linestyle="--", linewidth=1, label="best possible from one image alone"
        )
        for place, arm in enumerate(ARMS):
            values = {mode: by_seed(records, mode, task=task, arm=arm) for mode in MODES}
            ends = [fmean(seeds) for seeds in values.values()]
            panel.plot([place, place], ends, color="#BBBBBB", linewidth=6, solid_capstyle="butt", zorder=1)
            for mode, seeds in values.items():
                name, colour, marker, aside = MODES[mode]
                label = name if arm == "group" else None
                spread = [place + aside + 0.02 * (seed - (len(seeds) - 1) / 2) for seed in range(len(seeds))]
                panel.scatter(spread, seeds, s=36, color=colour, marker=marker, alpha=0.8, label=label)
        panel.set_title(title)
        panel.set_xticks(range(len(ARMS)), ARMS.values())
        panel.set_xlabel("whose statistics normalize an image")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("correct answers to “is it the odd one out?” (%)")
    panels[0].set_ylim(40, 101)
    panels[1].legend(frameon=False, loc="upper right")
    figure.suptitle("Does the network read the answer from the batch? (a point for each seed)")
    return figure


EXPERIMENT = Experiment.of(
    Claim(
        name="leakage",
        title="Leakage through the batch",
        statement="Batch statistics give a sample information about the others in its batch; if it reveals the label, "
        "the network relies on it, and fails in evaluation.",
        source="[He, Fan, Wu, Xie & Girshick 2020](https://arxiv.org/abs/1911.05722), "
        "[Wu & Johnson 2021](https://arxiv.org/abs/2105.07576)",
        setting="In groups of 32 images of MNIST, 16 show one digit and 16 show others: which are odd? Perceptron with "
        "hidden layers of 256, 128 and 128 units, each normalized, ReLU; 1,000 steps of four groups, SGD with momentum "
        "0.9 and a rate from 0.1 to 0; tested on 320 groups of test images; 5 seeds.",
    ),
    globals(),
)

if __name__ == "__main__":
    main(EXPERIMENT)
