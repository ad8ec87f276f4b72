"""The headline of a comparison: its main results as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.compare.inputs.choices import Grid
from batchnorm.compare.inputs.norms import AS_IS
from batchnorm.compare.report.summary import FEWEST, Difference, Outcome, Spread, contestants, reference

ALIKE = 1.05  # a smaller ratio is reported as "about the same"
NOTHING = 0.005  # points; a smaller difference is rounding, because one of a thousand test samples is 0.1 points
NAMED = 4  # largest number of labels that a sentence lists


def headline(found: Sequence[Outcome], grid: Grid, target_accuracy: float) -> list[str]:
    """Return the main results as a few sentences.

    Args:
        found: The outcomes; the others are compared with the first.
        grid: The grid of the comparison.
        target_accuracy: The accuracy to reach, 0 to 1.
    """
    if len(found) == 1:
        return [_final(found), _arrival_of_one(found[0], target_accuracy), _cost_of_one(found[0])]
    if len(found) == 2:
        base, other = found
        return [_final([other, base]), _arrival(other, base, target_accuracy), _cost(other, base)]
    return _many(found, grid, target_accuracy)


def percent(share: float) -> str:
    """Return a share as a percentage with one decimal."""
    return f"{100 * share:.1f} %"


def accuracy(spread: Spread) -> str:
    """Return accuracies as mean and standard deviation in percent."""
    return percent(spread.mean) if spread.std is None else f"{100 * spread.mean:.1f} ± {100 * spread.std:.1f} %"


def points(value: float) -> str:
    """Return a difference with its sign. A small one has a second decimal, so that it does not look like zero."""
    if abs(value) < NOTHING:
        return "0"
    return (f"{value:+.1f}" if abs(value) >= 0.05 else f"{value:+.2f}").replace("-", "−")


def duration(seconds: float) -> str:
    """Return a duration with three digits and a suitable unit."""
    rounded = float(f"{seconds:.3g}")
    if rounded >= 1:
        return f"{rounded:,.0f} s" if rounded >= 100 else f"{rounded:g} s"
    return f"{1e3 * rounded:.3g} ms" if rounded >= 1e-3 else f"{1e6 * rounded:.3g} µs"


def memory(count: float) -> str:
    """Return a number of bytes with three digits and a suitable unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def listed(labels: Sequence[str]) -> str:
    """Return labels as a short list."""
    shown = list(labels[:NAMED])
    if len(labels) > NAMED:
        shown.append(f"{len(labels) - NAMED} more")
    comma = "; " if any("," in label for label in shown) else ", "
    return " and ".join(filter(None, [comma.join(shown[:-1]), shown[-1]]))


def verdict(difference: Difference | None) -> str:
    """Return a phrase that says whether a difference is decided, with its interval."""
    if difference is None:
        return "every seed diverged in one of the two, so there is no difference to report"
    if difference.low is None or difference.high is None:
        what = "one seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
        return f"no interval from {what}: it takes at least {FEWEST}"
    if max(abs(difference.low), abs(difference.high)) < NOTHING:
        return f"equal in each of {difference.seeds} seeds"
    if difference.decided:
        return (
            f"95 % interval {points(difference.low)} to {points(difference.high)} points over {difference.seeds} seeds"
        )
    return (
        f"not decided by {difference.seeds} seeds: the 95 % interval is {points(difference.low)} to "
        f"{points(difference.high)} points"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


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


def _after(found: Sequence[Outcome]) -> str:
    steps = {outcome.steps for outcome in found}
    return f"after {steps.pop():,} steps" if len(steps) == 1 else "at the end of training"


def _diverged(found: Sequence[Outcome]) -> list[str]:
    return [
        f"training with {outcome.title} diverged in {_some(len(outcome.diverged), len(outcome.seeds))}"
        for outcome in found
        if outcome.diverged
    ]


def _seeds(ended: Sequence[Outcome]) -> str:
    """Return a phrase that says which statistic the accuracies are."""
    counts = [len(outcome.accuracy_by_seed) for outcome in ended]
    if set(counts) == {1}:
        return "one seed"
    # If a choice has lost a seed, name each count, in the order of the accuracies.
    which = " and ".join(str(count) for count in (counts[:1] if len(set(counts)) == 1 else counts))
    return f"mean ± standard deviation of {which} seeds"


def _final(found: Sequence[Outcome]) -> str:
    """Return the final accuracies of one outcome, or of two with their difference."""
    ended = [outcome for outcome in found if outcome.final_accuracy]
    parts = []
    if ended:
        reached = " and ".join(f"{accuracy(o.final_accuracy)} with {o.title}" for o in ended if o.final_accuracy)
        parts.append(f"{_after(found)}, test accuracy was {reached} ({_seeds(ended)})")
    diverged = _diverged(found)
    if len(ended) == 2 and not diverged:
        parts[0] += f": {_difference(*found)}"
    return _sentence("; ".join([*parts, *diverged]))


def _difference(other: Outcome, base: Outcome) -> str:
    """Return a phrase that says which of two choices ended higher, by how much, and whether that is decided."""
    found = Difference.between(other, base)
    if found is None or abs(found.points) < NOTHING:
        return f"no difference on average; {verdict(found)}"
    which = "higher" if found.points > 0 else "lower"
    size = f"{points(abs(found.points)).lstrip('+')} points {which} with {other.title}"
    if found.seeds >= FEWEST and not found.decided:
        return f"{size}, but {verdict(found)}"
    return f"{size} ({verdict(found)})"


def _reached(outcome: Outcome) -> str:
    """Return the seeds in which the outcome reached the target, and when, as the end of a sentence."""
    text = _some(len(outcome.reached), len(outcome.seeds))
    if outcome.steps_to_target and outcome.seconds_to_target:
        text += (
            f", after {outcome.steps_to_target.median:,.0f} steps and "
            f"{duration(outcome.seconds_to_target.median)} of training (median)"
        )
    return text


def _arrival_of_one(outcome: Outcome, target_accuracy: float) -> str:
    target = percent(target_accuracy)
    return f"Test accuracy reached {target} with {outcome.title} in {_reached(outcome)}."


def _arrival(other: Outcome, base: Outcome, target_accuracy: float) -> str:
    target = percent(target_accuracy)
    within = f"within {base.steps:,} steps" if base.steps == other.steps else "by the end of training"
    if not other.reached and not base.reached:
        return f"Test accuracy reached {target} neither with {other.title} nor with {base.title} {within} in any seed."
    if len(other.reached) == len(other.seeds) and len(base.reached) == len(base.seeds):
        assert other.steps_to_target and base.steps_to_target
        assert other.seconds_to_target and base.seconds_to_target
        ours, theirs = other.steps_to_target.median, base.steps_to_target.median
        seconds, their_seconds = other.seconds_to_target.median, base.seconds_to_target.median
        which = "one seed" if len(other.seeds) == 1 else f"medians of {len(other.seeds)} seeds"
        return (
            f"Test accuracy reached {target} after {ours:,.0f} steps with {other.title} and after {theirs:,.0f} with "
            f"{base.title} ({_ratio(ours, theirs, 'fewer', 'as many')}); in training time, that is {duration(seconds)} "
            f"and {duration(their_seconds)} ({_ratio(seconds, their_seconds, 'shorter', 'as long')}; {which})."
        )
    return _sentence(
        f"{within}, test accuracy reached {target} with {other.title} in {_reached(other)}; with {base.title} in "
        f"{_reached(base)}"
    )


def _cost_of_one(outcome: Outcome) -> str:
    assert outcome.seconds_per_step
    return f"One training step took {duration(outcome.seconds_per_step.median)}."


def _cost(other: Outcome, base: Outcome) -> str:
    assert other.seconds_per_step and base.seconds_per_step
    ours, theirs = other.seconds_per_step.median, base.seconds_per_step.median
    return (
        f"One training step took {duration(ours)} with {other.title} and {duration(theirs)} with {base.title} "
        f"({_ratio(ours, theirs, 'shorter', 'as long')})."
    )


def _many(found: Sequence[Outcome], grid: Grid, target_accuracy: float) -> list[str]:
    ranked = sorted(contestants(found, grid), key=lambda outcome: outcome.rank)
    winner, *others = ranked
    sentences = [_winner(winner, others)]
    base = reference(found, grid)
    if base not in ranked[:2] and base.final_accuracy:
        difference = Difference.between(winner, base)
        end = f"{_ahead(difference, base)}, which ended at {accuracy(base.final_accuracy)}"
        sentences.append(f"It was {end}; {verdict(difference)}.")
    close = [o.label for o in others if (d := Difference.between(winner, o)) and d.low is not None and not d.decided]
    if len(close) > 1:
        sentences.append(f"These seeds do not decide between the best and {listed(close)}.")
    if len(ranked) < len(found):
        what = "network" if grid.norm == (AS_IS,) else "norm"
        sentences.append(
            f"Each {what} is shown at the best of its {len(found) // len(ranked)} settings; as the test data decided "
            "which is best, these accuracies are slightly too high."
        )
    lost = [outcome for outcome in found if outcome.diverged]
    if lost:
        runs = sum(len(outcome.diverged) for outcome in lost)
        total = sum(len(outcome.seeds) for outcome in found)
        sentences.append(f"Training diverged in {runs} of {total} runs: {listed([outcome.label for outcome in lost])}.")
    return [*sentences, _speed(ranked, target_accuracy)]


def _winner(winner: Outcome, others: Sequence[Outcome]) -> str:
    if winner.final_accuracy is None:
        return "Training diverged with every choice and seed."
    text = f"{winner.title} had the highest final test accuracy, {accuracy(winner.final_accuracy)} ({_seeds([winner])})"
    if others and others[0].final_accuracy and not others[0].diverged and not winner.diverged:
        difference = Difference.between(winner, others[0])
        text += f", {_ahead(difference, others[0])}; {verdict(difference)}"
    return _sentence(text)


def _ahead(difference: Difference | None, other: Outcome) -> str:
    """Return a phrase that says how far the best outcome is above another one."""
    if difference is None:
        return f"ahead of {other.title}"
    if abs(difference.points) < NOTHING:
        return f"the same as {other.title}"
    # The best outcome is below only if the other lacks seeds.
    which = "above" if difference.points > 0 else "below"
    return f"{points(abs(difference.points)).lstrip('+')} points {which} {other.title}"


def _speed(ranked: Sequence[Outcome], target_accuracy: float) -> str:
    arrived = [o for o in ranked if o.steps_to_target and o.seconds_to_target and len(o.reached) == len(o.seeds)]
    costs = sorted((o.seconds_per_step.median, o.label) for o in ranked if o.seconds_per_step)
    least, most = (f"{duration(seconds)} ({label})" for seconds, label in (costs[0], costs[-1]))
    step = f"a training step took {least} to {most}"
    target = f"{percent(target_accuracy)} test accuracy"
    if not arrived:
        return _sentence(f"no choice named here reached {target} in every seed; {step}")
    by_steps = min(arrived, key=lambda o: o.steps_to_target.median if o.steps_to_target else 0)
    by_seconds = min(arrived, key=lambda o: o.seconds_to_target.median if o.seconds_to_target else 0)
    assert by_steps.steps_to_target and by_seconds.seconds_to_target
    steps = f"the fewest steps ({by_steps.steps_to_target.median:,.0f})"
    seconds = f"the least time ({duration(by_seconds.seconds_to_target.median)})"
    first = f"{steps} and" if by_seconds is by_steps else f"{steps} with {by_steps.label} and"
    return _sentence(f"reaching {target} took {first} {seconds} with {by_seconds.label}; {step}")
