from __future__ import annotations

import math

import pytest

from batchnorm.compare import Evaluation, Outcome, Run, Spread, Step
from batchnorm.compare.summary import duration, headline, step_seconds, target_evaluation

TITLES = {"none": "no normalization", "batch": "batch normalization"}


def make_run(norm: str, seed: int, accuracies: list[float], seconds: float = 0.001, diverged: bool = False) -> Run:
    """A run that was looked at before training and after every tenth step."""
    run = Run(norm, seed, 100, None, [], [])
    count = 10 * (len(accuracies) - 1)
    run.steps = [Step(step, step * seconds, 1.0) for step in range(1, count + 1)]
    run.evaluations = [Evaluation(10 * k, 10 * k * seconds, 0.5, a) for k, a in enumerate(accuracies)]
    run.diverged_at = count if diverged else None
    return run


def outcome(norm: str, curves: list[list[float]], seconds: float = 0.001, diverged: tuple[int, ...] = ()) -> Outcome:
    runs = [make_run(norm, seed, curve, seconds, seed in diverged) for seed, curve in enumerate(curves)]
    return Outcome.of(runs, TITLES[norm], target_accuracy=0.9)


def words(*outcomes: Outcome) -> list[str]:
    return headline(outcomes, 0.9, 30)


def test_outcome_takes_the_first_look_at_the_target():
    run = make_run("none", 0, [0.1, 0.9, 0.8, 0.95])
    assert target_evaluation(run, 0.9).step == 10
    assert target_evaluation(run, 0.91).step == 30
    assert target_evaluation(run, 0.96) is None


def test_outcome_over_seeds():
    found = outcome("none", [[0.1, 0.5, 0.9, 0.92], [0.1, 0.9, 0.9, 0.94], [0.1, 0.2, 0.3, 0.4]])
    assert found.reached == [0, 1]
    assert found.steps_to_target.values == [20, 10]
    assert found.seconds_to_target.median == pytest.approx(0.015)
    assert found.seconds_per_step.median == pytest.approx(0.001)
    assert found.final_accuracy.mean == pytest.approx((0.92 + 0.94 + 0.4) / 3)
    assert found.final_accuracy.low == 0.4


def test_spread_of_one_value_has_no_deviation():
    assert Spread.over([2.0]) == Spread([2.0], 2.0, 2.0, None, 2.0, 2.0)
    assert Spread.over([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert Spread.over([]) is None


def test_step_seconds_are_the_differences():
    assert step_seconds(make_run("none", 0, [0.1, 0.2], seconds=0.5)) == pytest.approx([0.5] * 10)


def test_the_headline_tells_a_gain():
    slow = outcome("none", [[0.1, 0.5, 0.8, 0.92], [0.1, 0.5, 0.8, 0.91]], seconds=0.001)
    fast = outcome("batch", [[0.1, 0.9, 0.95, 0.96], [0.1, 0.9, 0.95, 0.95]], seconds=0.002)
    assert words(slow, fast) == [
        "With batch normalization the network reached 90.0 % test accuracy after 10 steps, with no normalization after "
        "30 (3.0× fewer); in training time that is 20 ms against 30 ms (1.5× shorter; medians of 2 seeds).",
        "One training step took 2 ms with batch normalization and 1 ms with no normalization (2.0× as long).",
        "After 30 steps test accuracy was 95.5 ± 0.7 % with batch normalization and 91.5 ± 0.7 % with no normalization "
        "(mean ± standard deviation of 2 seeds): 4.0 points higher with batch normalization, and higher in each of the "
        "2 seeds.",
    ]


def test_the_headline_tells_a_loss_as_plainly():
    base = outcome("none", [[0.1, 0.9, 0.95, 0.96], [0.1, 0.9, 0.95, 0.95]], seconds=0.001)
    worse = outcome("batch", [[0.1, 0.5, 0.8, 0.92], [0.1, 0.5, 0.8, 0.91]], seconds=0.001)
    arrival, cost, final = words(base, worse)
    assert "after 30 steps, with no normalization after 10 (3.0× as many)" in arrival
    assert "30 ms against 10 ms (3.0× as long;" in arrival
    assert cost.endswith("(about the same).")
    assert "4.0 points lower with batch normalization, and lower in each of the 2 seeds" in final


def test_seeds_that_disagree_decide_nothing():
    base = outcome("none", [[0.1, 0.95], [0.1, 0.92]])
    other = outcome("batch", [[0.1, 0.94], [0.1, 0.95]])
    assert words(base, other)[2].endswith(
        "but the seeds do not agree (higher in 1, lower in 1 of 2): not decided here."
    )


def test_equal_accuracies_are_no_difference():
    base, other = outcome("none", [[0.1, 0.95]]), outcome("batch", [[0.1, 0.95]])
    final = words(base, other)[2]
    assert "no difference to the first decimal, from one seed, so nothing is known about the spread" in final
    assert "(one seed)" in final


def test_a_target_that_was_not_reached_is_said():
    never = outcome("none", [[0.1, 0.2], [0.1, 0.3]])
    once = outcome("batch", [[0.1, 0.2], [0.1, 0.95]])
    assert words(never, outcome("batch", [[0.1, 0.2], [0.1, 0.2]]))[0] == (
        "Neither with batch normalization nor with no normalization did the network reach 90.0 % test accuracy within "
        "30 steps in any seed."
    )
    assert words(never, once)[0] == (
        "Within 30 steps the network reached 90.0 % test accuracy with batch normalization in 1 of 2 seeds, there "
        "after 10 steps and 10 ms of training (median); with no normalization in none of 2 seeds."
    )


def test_divergence_is_said():
    base = outcome("none", [[0.1, 0.95], [0.1, 0.1]], diverged=(1,))
    other = outcome("batch", [[0.1, 0.95], [0.1, 0.95]])
    assert words(base, other)[2] == (
        "After 30 steps test accuracy was 95.0 ± 0.0 % with batch normalization and 95.0 % with no normalization (mean "
        "± standard deviation of 2 and 1 seeds); training with no normalization diverged in 1 of 2 seeds."
    )
    assert words(other, base)[2].startswith(
        "After 30 steps test accuracy was 95.0 % with no normalization and 95.0 ± 0.0 %"
    )
    lost = outcome("none", [[0.1, 0.1], [0.1, 0.1]], diverged=(0, 1))
    assert words(lost, other)[2] == (
        "After 30 steps test accuracy was 95.0 ± 0.0 % with batch normalization (mean ± standard deviation of 2 "
        "seeds); training with no normalization diverged in all 2 seeds."
    )
    assert words(lost, lost)[2].count("diverged in all 2 seeds") == 2
    assert words(other, lost)[2] == words(lost, other)[2]


def test_one_norm_alone_has_a_headline():
    assert words(outcome("none", [[0.1, 0.95], [0.1, 0.95]])) == [
        "With no normalization the network reached 90.0 % test accuracy within 30 steps in all 2 seeds, there after 10 "
        "steps and 10 ms of training (median).",
        "One training step took 1 ms.",
        "After 30 steps test accuracy was 95.0 ± 0.0 % with no normalization (mean ± standard deviation of 2 seeds).",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1234.5, "1,230 s"), (12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.63e-4, "463 µs"), (0.0, "0 µs"), (0.9999, "1 s")],
)
def test_durations_have_a_fitting_unit(seconds, text):
    assert duration(seconds) == text
