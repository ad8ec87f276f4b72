"""What a comparison found, in figures and in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchnorm.compare.records import Evaluation, Run

ALIKE = 1.05  # ratios nearer to 1 than this are called about the same


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds.

    Attributes:
        values: One for each seed that has one.
        median: Their median.
        mean: Their mean.
        std: Their standard deviation (of the sample, so with n − 1); None for fewer than two.
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
        """Returns the spread of the values, or None if there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(list(values), statistics.median(values), statistics.fmean(values), std, min(values), max(values))


@dataclass(frozen=True)
class Outcome:
    """What one normalization did, over all seeds.

    Attributes:
        norm: As the user wrote it.
        title: What it is called in a sentence.
        parameters: Number of trainable values of its network.
        seeds: The seeds.
        diverged: The seeds whose training was given up because the loss was not finite.
        reached: The seeds that reached the target accuracy at some evaluation.
        steps_to_target: Steps before the first evaluation at or above the target, over the seeds that reached it.
        seconds_to_target: Training seconds until then.
        seconds_per_step: Median duration of a training step, over the seeds.
        final_accuracy: Test accuracy at the last evaluation, over the seeds that did not diverge.
        final_loss: Test loss at the last evaluation, likewise.
    """

    norm: str
    title: str
    parameters: int
    seeds: list[int]
    diverged: list[int]
    reached: list[int]
    steps_to_target: Spread | None
    seconds_to_target: Spread | None
    seconds_per_step: Spread | None
    final_accuracy: Spread | None
    final_loss: Spread | None

    @classmethod
    def of(cls, runs: Sequence[Run], title: str, target_accuracy: float) -> Outcome:
        """Returns the outcome of the runs of one normalization."""
        whole = [run for run in runs if run.diverged_at is None]
        arrivals = {run.seed: target_evaluation(run, target_accuracy) for run in runs}
        reached = {seed: arrival for seed, arrival in arrivals.items() if arrival is not None}
        final = [run.evaluations[-1] for run in whole]
        return cls(
            norm=runs[0].norm,
            title=title,
            parameters=runs[0].parameters,
            seeds=[run.seed for run in runs],
            diverged=[run.seed for run in runs if run.diverged_at is not None],
            reached=list(reached),
            steps_to_target=Spread.over([arrival.step for arrival in reached.values()]),
            seconds_to_target=Spread.over([arrival.train_seconds for arrival in reached.values()]),
            seconds_per_step=Spread.over([statistics.median(step_seconds(run)) for run in runs if run.steps]),
            final_accuracy=Spread.over([evaluation.test_accuracy for evaluation in final]),
            final_loss=Spread.over([e.test_loss for e in final if e.test_loss is not None]),
        )


def target_evaluation(run: Run, target_accuracy: float) -> Evaluation | None:
    """Returns the first evaluation at or above the target accuracy."""
    return next((e for e in run.evaluations if e.test_accuracy >= target_accuracy), None)


def step_seconds(run: Run) -> list[float]:
    """Returns how long each training step took."""
    ends = [0.0, *(step.train_seconds for step in run.steps)]
    return [end - begin for begin, end in pairwise(ends)]


def outcomes(runs: Sequence[Run], titles: dict[str, str], target_accuracy: float) -> list[Outcome]:
    """Returns the outcome of each normalization, in the order of `titles`."""
    return [
        Outcome.of([run for run in runs if run.norm == norm], title, target_accuracy) for norm, title in titles.items()
    ]


def headline(found: Sequence[Outcome], target_accuracy: float, steps: int) -> list[str]:
    """Returns what was found as sentences: each normalization beside the first one.

    Args:
        found: The outcomes; the first is what the others are compared with.
        target_accuracy: The accuracy to reach, 0 to 1.
        steps: The planned number of training steps.
    """
    base = found[0]
    if len(found) == 1:
        return [_arrival(base, None, target_accuracy, steps), _cost(base, None), _final(base, None, steps)]
    return [
        sentence
        for other in found[1:]
        for sentence in (
            _arrival(other, base, target_accuracy, steps),
            _cost(other, base),
            _final(other, base, steps),
        )
    ]


def percent(share: float) -> str:
    """Returns a share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Returns a duration in three digits and a unit that fits it."""
    rounded = float(f"{seconds:.3g}")
    if rounded >= 1:
        return f"{rounded:,.0f} s" if rounded >= 100 else f"{rounded:g} s"
    return f"{1e3 * rounded:.3g} ms" if rounded >= 1e-3 else f"{1e6 * rounded:.3g} µs"


def _ratio(value: float, base: float, less: str, more: str) -> str:
    if value <= 0 or base <= 0:
        return "no ratio"
    if max(value / base, base / value) < ALIKE:
        return "about the same"
    return f"{base / value:.1f}× {less}" if base > value else f"{value / base:.1f}× {more}"


def _some(count: int, total: int) -> str:
    if count == total:
        return "the only seed" if total == 1 else f"all {total} seeds"
    return f"none of {total} seeds" if count == 0 else f"{count} of {total} seeds"


def _whole(outcome: Outcome) -> bool:
    return len(outcome.reached) == len(outcome.seeds)


def _reached(outcome: Outcome) -> str:
    """Returns, for an outcome, where it reached the target and when, as the end of a sentence."""
    text = _some(len(outcome.reached), len(outcome.seeds))
    if outcome.steps_to_target and outcome.seconds_to_target:
        text += (
            f", there after {outcome.steps_to_target.median:,.0f} steps and "
            f"{duration(outcome.seconds_to_target.median)} of training (median)"
        )
    return text


def _arrival(other: Outcome, base: Outcome | None, target_accuracy: float, steps: int) -> str:
    target = f"{percent(target_accuracy)} test accuracy"
    if base is None:
        return f"With {other.title} the network reached {target} within {steps:,} steps in {_reached(other)}."
    if not other.reached and not base.reached:
        return (
            f"Neither with {other.title} nor with {base.title} did the network reach {target} within {steps:,} steps "
            f"in any seed."
        )
    if _whole(other) and _whole(base):
        assert other.steps_to_target and base.steps_to_target
        assert other.seconds_to_target and base.seconds_to_target
        ours, theirs = other.steps_to_target.median, base.steps_to_target.median
        seconds, their_seconds = other.seconds_to_target.median, base.seconds_to_target.median
        which = "one seed" if len(other.seeds) == 1 else f"medians of {len(other.seeds)} seeds"
        return (
            f"With {other.title} the network reached {target} after {ours:,.0f} steps, with {base.title} after "
            f"{theirs:,.0f} ({_ratio(ours, theirs, 'fewer', 'as many')}); in training time that is {duration(seconds)} "
            f"against {duration(their_seconds)} ({_ratio(seconds, their_seconds, 'shorter', 'as long')}; {which})."
        )
    return (
        f"Within {steps:,} steps the network reached {target} with {other.title} in {_reached(other)}; with "
        f"{base.title} in {_reached(base)}."
    )


def _cost(other: Outcome, base: Outcome | None) -> str:
    assert other.seconds_per_step
    ours = other.seconds_per_step.median
    if base is None:
        return f"One training step took {duration(ours)}."
    assert base.seconds_per_step
    theirs = base.seconds_per_step.median
    return (
        f"One training step took {duration(ours)} with {other.title} and {duration(theirs)} with {base.title} "
        f"({_ratio(ours, theirs, 'shorter', 'as long')})."
    )


def _final(other: Outcome, base: Outcome | None, steps: int) -> str:
    both = [outcome for outcome in (other, base) if outcome is not None]
    ended = [outcome for outcome in both if outcome.final_accuracy]
    lost = [outcome for outcome in both if outcome.diverged]
    parts = []
    if ended:
        accuracies = " and ".join(f"{_accuracy(outcome)} with {outcome.title}" for outcome in ended)
        parts.append(f"after {steps:,} steps test accuracy was {accuracies}{_seeds(ended)}")
    if len(ended) == 2 and not lost:
        parts[0] += f": {_difference(*ended)}"
    parts += [
        f"training with {outcome.title} diverged in {_some(len(outcome.diverged), len(outcome.seeds))}"
        for outcome in lost
    ]
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _accuracy(outcome: Outcome) -> str:
    spread = outcome.final_accuracy
    assert spread
    if spread.std is None:
        return percent(spread.mean)
    return f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f} %"


def _seeds(ended: Sequence[Outcome]) -> str:
    """Returns what the accuracies are made of, in brackets."""
    counts = [len(outcome.final_accuracy.values) for outcome in ended if outcome.final_accuracy]
    if set(counts) == {1}:
        return " (one seed)"
    # Where one has lost a seed, each count is said, in the order of the accuracies.
    which = " and ".join(str(count) for count in (counts[:1] if len(set(counts)) == 1 else counts))
    return f" (mean ± standard deviation of {which} seeds)"


def _difference(other: Outcome, base: Outcome) -> str:
    """Returns which is higher by how much, and whether the seeds agree; seed by seed, as they share the data order."""
    assert other.final_accuracy and base.final_accuracy
    pairs = zip(other.final_accuracy.values, base.final_accuracy.values, strict=True)
    differences = [100 * (ours - theirs) for ours, theirs in pairs]
    mean, count = statistics.fmean(differences), len(differences)
    higher = sum(difference > 0 for difference in differences)
    lower = sum(difference < 0 for difference in differences)
    if round(abs(mean), 1) == 0:
        size = "no difference to the first decimal"
    else:
        size = f"{abs(mean):.1f} points {'higher' if mean > 0 else 'lower'} with {other.title}"
    if count == 1:
        return f"{size}, from one seed, so nothing is known about the spread"
    if count in (higher, lower):
        return f"{size}, and {'higher' if higher else 'lower'} in each of the {count} seeds"
    return f"{size}, but the seeds do not agree (higher in {higher}, lower in {lower} of {count}): not decided here"
