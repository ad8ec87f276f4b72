"""The outcome of each choice over its seeds, and the differences between choices."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchnorm.compare.inputs.choices import Choice, Grid
from batchnorm.compare.inputs.settings import Settings
from batchnorm.compare.records import Evaluation, Run

CONFIDENCE = 0.95
TUNED = {"lr", "batch_size"}  # settings of which each contestant is shown at its best
SHOWN = 8  # largest number of series that can be distinguished in one chart
FEWEST = 3  # seeds for an interval, because Student's factor is 12.7 with two


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds.

    Attributes:
        values: One for each seed that has a value.
        median: Their median.
        mean: Their mean.
        std: Their sample standard deviation (with n − 1); None for fewer than two.
        low: The smallest.
        high: The largest.
    """

    values: list[float]
    median: float
    mean: float
    std: float | None
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of the values, or None if there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(list(values), statistics.median(values), statistics.fmean(values), std, min(values), max(values))


@dataclass(frozen=True)
class Outcome:
    """The outcome of one choice over all seeds.

    Attributes:
        choice: The choice.
        label: Its name in this comparison.
        title: Its name in a sentence.
        parameters: Number of trainable values of its network.
        kept_bytes: Memory that one training step keeps for its backward pass; None if unknown.
        steps: The planned number of training steps.
        seeds: The seeds whose runs have ended.
        diverged: The seeds whose training stopped because the loss was not finite.
        reached: The seeds that reached the target accuracy at some evaluation.
        steps_to_target: Steps before the first evaluation at or above the target, over the seeds that reached it.
        seconds_to_target: Training seconds until then.
        seconds_per_step: Median duration of a training step, over the seeds.
        seconds_per_epoch: The same for one epoch, without the samples that do not fill a batch.
        final_accuracy: Test accuracy at the last evaluation, over the seeds that did not diverge.
        final_loss: Test loss at the last evaluation, likewise.
        gap: Training accuracy minus test accuracy at the last evaluation, likewise.
    """

    choice: Choice
    label: str
    title: str
    parameters: int
    kept_bytes: int | None
    steps: int
    seeds: list[int]
    diverged: list[int]
    reached: list[int]
    steps_to_target: Spread | None
    seconds_to_target: Spread | None
    seconds_per_step: Spread | None
    seconds_per_epoch: Spread | None
    final_accuracy: Spread | None
    final_loss: Spread | None
    gap: Spread | None

    @property
    def accuracy_by_seed(self) -> dict[int, float]:
        """Final test accuracy of the seeds that did not diverge."""
        whole = [seed for seed in self.seeds if seed not in self.diverged]
        return dict(zip(whole, self.final_accuracy.values if self.final_accuracy else [], strict=True))

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, best first: fewest diverged seeds, then highest accuracy."""
        mean = self.final_accuracy.mean if self.final_accuracy else 0.0
        return len(self.diverged) / len(self.seeds), -mean

    @classmethod
    def of(
        cls, runs: Sequence[Run], label: str, title: str, *, steps: int, epoch_steps: int, target_accuracy: float
    ) -> Outcome:
        """Return the outcome of the runs of one choice."""
        whole = [run for run in runs if run.diverged_at is None]
        arrivals = {run.seed: target_evaluation(run, target_accuracy) for run in runs}
        reached = {seed: arrival for seed, arrival in arrivals.items() if arrival is not None}
        final = [run.evaluations[-1] for run in whole]
        durations = [statistics.median(step_seconds(run)) for run in runs if run.steps]
        gaps = [e.train_accuracy - e.test_accuracy for e in final if e.train_accuracy is not None]
        return cls(
            choice=runs[0].choice,
            label=label,
            title=title,
            parameters=runs[0].parameters,
            kept_bytes=runs[0].kept_bytes,
            steps=steps,
            seeds=[run.seed for run in runs],
            diverged=[run.seed for run in runs if run.diverged_at is not None],
            reached=list(reached),
            steps_to_target=Spread.over([arrival.step for arrival in reached.values()]),
            seconds_to_target=Spread.over([arrival.train_seconds for arrival in reached.values()]),
            seconds_per_step=Spread.over(durations),
            seconds_per_epoch=Spread.over([epoch_steps * duration for duration in durations]),
            final_accuracy=Spread.over([evaluation.test_accuracy for evaluation in final]),
            final_loss=Spread.over([e.test_loss for e in final if e.test_loss is not None]),
            gap=Spread.over(gaps),
        )


@dataclass(frozen=True)
class Difference:
    """The difference in final accuracy between two choices, paired by seed (same initial values and data order).

    Attributes:
        points: Mean difference of the final test accuracies, in percentage points.
        low: Lower end of its 95 % interval (Student's t over the paired differences); None for fewer than 3 seeds.
        high: Upper end.
        seeds: Number of seeds in which neither diverged.
    """

    points: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    @classmethod
    def between(cls, ours: Outcome, theirs: Outcome) -> Difference | None:
        """Return the accuracy of `ours` minus that of `theirs`, or None if each seed diverged in one of them."""
        a, b = ours.accuracy_by_seed, theirs.accuracy_by_seed
        return cls.over([100 * (a[seed] - b[seed]) for seed in a if seed in b])

    @classmethod
    def over(cls, differences: Sequence[float]) -> Difference | None:
        """Return the mean of paired differences with its interval."""
        if not differences:
            return None
        mean, count = statistics.fmean(differences), len(differences)
        if count < FEWEST:
            return cls(mean, None, None, count)
        # The quantile of Student's t. scipy.stats has it too, but takes a second to import.
        from scipy.special import stdtrit  # type: ignore[import-untyped]

        reach = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(count)
        return cls(mean, mean - reach, mean + reach, count)


def target_evaluation(run: Run, target_accuracy: float) -> Evaluation | None:
    """Return the first evaluation at or above the target accuracy."""
    return next((e for e in run.evaluations if e.test_accuracy >= target_accuracy), None)


def step_seconds(run: Run) -> list[float]:
    """Return the duration of each training step."""
    ends = [0.0, *(step.train_seconds for step in run.steps)]
    return [end - begin for begin, end in pairwise(ends)]


def outcomes(runs: Sequence[Run], settings: Settings, titles: dict[str, str], samples: int) -> list[Outcome]:
    """Return the outcome of each choice that has runs, in the grid's order.

    Args:
        runs: The finished runs.
        settings: The settings of the comparison.
        titles: The name of each norm in a sentence.
        samples: Number of training samples.
    """
    grid, found = settings.grid, []
    for choice in grid.choices:
        of_choice = [run for run in runs if run.choice == choice]
        if of_choice:
            outcome = Outcome.of(
                of_choice,
                grid.label(choice),
                grid.title(choice, titles[choice.norm]),
                steps=settings.steps_of(choice, samples),
                epoch_steps=samples // choice.batch_size,
                target_accuracy=settings.target_accuracy,
            )
            found.append(outcome)
    return found


def contestants(found: Sequence[Outcome], grid: Grid) -> list[Outcome]:
    """Return the outcomes with the best learning rate and batch size for each combination of the other settings.

    If only learning rate and batch size vary, return every outcome.
    """
    if set(grid.varying) <= TUNED:
        return list(found)
    best: dict[Choice, Outcome] = {}
    for outcome in found:
        key = outcome.choice.rival
        if key not in best or outcome.rank < best[key].rank:
            best[key] = outcome
    return list(best.values())


def reference(found: Sequence[Outcome], grid: Grid) -> Outcome:
    """Return the baseline of the comparison: the first of all choices, at its best learning rate and batch size."""
    rivals = contestants(found, grid)
    first = grid.choices[0].rival
    return next((outcome for outcome in rivals if outcome.choice.rival == first), rivals[0])


def shown(found: Sequence[Outcome], grid: Grid) -> list[Outcome]:
    """Return the outcomes that charts show initially: the reference and the best contestants, in the grid's order."""
    ranked = sorted(contestants(found, grid), key=lambda outcome: outcome.rank)
    base = reference(found, grid)
    kept = [base, *(outcome for outcome in ranked if outcome is not base)][:SHOWN]
    return [outcome for outcome in found if outcome in kept]
