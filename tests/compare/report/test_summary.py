from __future__ import annotations

import math

import pytest

from batchnorm.compare import Choice, Difference, Evaluation, Grid, Outcome, Run, Spread, Step
from batchnorm.compare.report.headline import duration, headline, memory, points
from batchnorm.compare.report.summary import contestants, reference, shown, step_seconds, target_evaluation

TITLES = {
    "none": "no normalization",
    "batch": "batch normalization",
    "group": "group normalization",
    "ghost": "ghost batch normalization",
}
Curves = list[list[float]]


def make_run(
    choice: Choice | str, seed: int, accuracies: list[float], seconds: float = 0.001, diverged: bool = False
) -> Run:
    """A run that was looked at before training and after every tenth step."""
    run = Run(Choice(choice) if isinstance(choice, str) else choice, seed, 100, kept_bytes=2048)
    count = 10 * (len(accuracies) - 1)
    run.steps = [Step(step, step * seconds, 1.0) for step in range(1, count + 1)]
    run.evaluations = [Evaluation(10 * k, 10 * k * seconds, 0.5, a, 0.4, a + 0.01) for k, a in enumerate(accuracies)]
    run.diverged_at = count if diverged else None
    return run


def grid_of(*norms: str, lr: tuple[float, ...] = (0.1,), sampling: tuple[str, ...] = ("iid",)) -> Grid:
    return Grid(norms, ("before",), lr, (64,), sampling, (None,), ("mlp",))


def outcome(
    norm: str,
    curves: Curves,
    seconds: float = 0.001,
    diverged: tuple[int, ...] = (),
    grid: Grid | None = None,
    lr: float = 0.1,
) -> Outcome:
    choice, grid = Choice(norm, lr=lr), grid or grid_of(norm)
    runs = [make_run(choice, seed, curve, seconds, seed in diverged) for seed, curve in enumerate(curves)]
    title = grid.title(choice, TITLES[norm])
    return Outcome.of(runs, grid.label(choice), title, steps=30, epoch_steps=150, target_accuracy=0.9)


def ending(norm: str, *finals: float, **options) -> Outcome:
    """The outcome of runs that end with these accuracies."""
    return outcome(norm, [[0.1, 0.5, final] for final in finals], **options)


def words(*outcomes: Outcome) -> list[str]:
    return headline(outcomes, grid_of(*dict.fromkeys(found.choice.norm for found in outcomes)), 0.9)


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
    assert found.accuracy_by_seed == {0: 0.92, 1: 0.94, 2: 0.4}
    assert found.seconds_per_epoch.median == pytest.approx(0.15)
    assert found.gap.mean == pytest.approx(0.01)
    assert found.kept_bytes == 2048


def test_spread_of_one_value_has_no_deviation():
    assert Spread.over([2.0]) == Spread([2.0], 2.0, 2.0, None, 2.0, 2.0)
    assert Spread.over([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert Spread.over([]) is None


def test_step_seconds_are_the_differences():
    assert step_seconds(make_run("none", 0, [0.1, 0.2], seconds=0.5)) == pytest.approx([0.5] * 10)


def test_the_headline_reports_a_gain():
    slow = outcome("none", [[0.1, 0.5, 0.8, 0.92], [0.1, 0.5, 0.8, 0.91], [0.1, 0.5, 0.8, 0.90]], seconds=0.001)
    fast = outcome("batch", [[0.1, 0.9, 0.95, 0.96], [0.1, 0.9, 0.95, 0.95], [0.1, 0.9, 0.95, 0.95]], seconds=0.002)
    assert words(slow, fast) == [
        "After 30 steps, test accuracy was 95.3 ± 0.6 % with batch normalization and 91.0 ± 1.0 % with no "
        "normalization (mean ± standard deviation of 3 seeds): 4.3 points higher with batch normalization (95 % "
        "interval +2.9 to +5.8 points over 3 seeds).",
        "Test accuracy reached 90.0 % after 10 steps with batch normalization and after 30 with no "
        "normalization (3.0× fewer); in training time, that is 20 ms and 30 ms (1.5× shorter; medians of 3 seeds).",
        "One training step took 2 ms with batch normalization and 1 ms with no normalization (2.0× as long).",
    ]


def test_the_headline_reports_a_loss_as_plainly():
    base = outcome("none", [[0.1, 0.9, 0.95, 0.96], [0.1, 0.9, 0.95, 0.95]], seconds=0.001)
    worse = outcome("batch", [[0.1, 0.5, 0.8, 0.92], [0.1, 0.5, 0.8, 0.91]], seconds=0.001)
    final, arrival, cost = words(base, worse)
    assert "after 30 steps with batch normalization and after 10 with no normalization (3.0× as many)" in arrival
    assert "30 ms and 10 ms (3.0× as long;" in arrival
    assert cost.endswith("(about the same).")
    assert "4.0 points lower with batch normalization (no interval from 2 seeds: it takes at least 3" in final


def test_a_difference_within_the_spread_is_not_decided():
    base, other = ending("none", 0.95, 0.92, 0.93), ending("batch", 0.94, 0.95, 0.94)
    assert words(base, other)[0].endswith(
        ": 1.0 points higher with batch normalization, but not decided by 3 seeds: the 95 % interval is −4.0 "
        "to +6.0 points."
    )


def test_intervals_are_those_of_students_t():
    """Against `scipy.stats`, which computes them in another way."""
    stats = pytest.importorskip("scipy.stats")
    ours, theirs = [0.95, 0.97, 0.94, 0.99], [0.93, 0.96, 0.95, 0.94]
    found = Difference.between(ending("batch", *ours), ending("none", *theirs))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((100 * interval.low, 100 * interval.high))
    assert not found.decided
    assert Difference.over([2.0, 2.0, 2.0]) == Difference(2.0, 2.0, 2.0, 3)
    assert Difference.over([2.0, 2.0, 2.0]).decided
    assert Difference.over([]) is None


def test_differences_are_of_the_seeds_that_both_ended_in():
    a = ending("none", 0.5, 0.6, 0.7, diverged=(1,))
    assert Difference.between(ending("batch", 0.9, 0.8, 0.8), a) == Difference(pytest.approx(25.0), None, None, 2)


def test_equal_accuracies_are_no_difference():
    base, other = ending("none", 0.95, 0.9, 0.93), ending("batch", 0.95, 0.9, 0.93)
    assert words(base, other)[0].endswith(
        "(mean ± standard deviation of 3 seeds): no difference on average; equal in each of 3 seeds."
    )
    many = headline([base, other, ending("group", 0.5, 0.6, 0.7)], grid_of("none", "batch", "group"), 0.9)
    assert "(mean ± standard deviation of 3 seeds), the same as batch normalization; equal" in many[0]
    one = words(ending("none", 0.95), ending("batch", 0.96))[0]
    assert "(one seed): 1.0 points higher with batch normalization (no interval from one seed: it" in one


def test_a_target_that_was_not_reached_is_reported():
    never = outcome("none", [[0.1, 0.2], [0.1, 0.3]])
    once = outcome("batch", [[0.1, 0.2], [0.1, 0.95]])
    assert words(never, outcome("batch", [[0.1, 0.2], [0.1, 0.2]]))[1] == (
        "Test accuracy reached 90.0 % neither with batch normalization nor with no normalization within 30 "
        "steps in any seed."
    )
    assert words(never, once)[1] == (
        "Within 30 steps, test accuracy reached 90.0 % with batch normalization in 1 of 2 seeds, "
        "after 10 steps and 10 ms of training (median); with no normalization in none of 2 seeds."
    )


def test_divergence_is_reported():
    base = outcome("none", [[0.1, 0.95], [0.1, 0.1]], diverged=(1,))
    other = outcome("batch", [[0.1, 0.95], [0.1, 0.95]])
    assert words(base, other)[0] == (
        "After 30 steps, test accuracy was 95.0 ± 0.0 % with batch normalization and 95.0 % with no normalization "
        "(mean ± standard deviation of 2 and 1 seeds); training with no normalization diverged in 1 of 2 seeds."
    )
    assert words(other, base)[0].startswith(
        "After 30 steps, test accuracy was 95.0 % with no normalization and 95.0 ± 0.0 %"
    )
    lost = outcome("none", [[0.1, 0.1], [0.1, 0.1]], diverged=(0, 1))
    assert words(lost, other)[0] == (
        "After 30 steps, test accuracy was 95.0 ± 0.0 % with batch normalization (mean ± standard deviation of 2 "
        "seeds); training with no normalization diverged in all 2 seeds."
    )
    assert words(lost, lost)[0].count("diverged in all 2 seeds") == 2
    assert words(other, lost)[0] == words(lost, other)[0]


def test_one_norm_alone_has_a_headline():
    assert words(outcome("none", [[0.1, 0.95], [0.1, 0.95]])) == [
        "After 30 steps, test accuracy was 95.0 ± 0.0 % with no normalization (mean ± standard deviation of 2 seeds).",
        "Test accuracy reached 90.0 % with no normalization in all 2 seeds, after 10 steps and 10 ms of "
        "training (median).",
        "One training step took 1 ms.",
    ]


def grid_outcomes() -> tuple[list[Outcome], Grid]:
    grid = grid_of("none", "batch", "group", lr=(0.1, 1.0))
    found = [
        ending("none", 0.90, 0.91, 0.92, lr=0.1, grid=grid),
        ending("none", 0.10, 0.11, 0.10, lr=1.0, grid=grid, diverged=(0, 2)),
        ending("batch", 0.93, 0.94, 0.94, lr=0.1, grid=grid),
        ending("batch", 0.96, 0.96, 0.97, lr=1.0, grid=grid, seconds=0.002),
        ending("group", 0.95, 0.96, 0.97, lr=0.1, grid=grid),
        ending("group", 0.50, 0.96, 0.99, lr=1.0, grid=grid),
    ]
    return found, grid


def test_a_grid_is_judged_at_each_norms_best():
    found, grid = grid_outcomes()
    assert [(o.choice.norm, o.choice.lr) for o in contestants(found, grid)] == [
        ("none", 0.1),
        ("batch", 1),
        ("group", 0.1),
    ]
    assert headline(found, grid, 0.9) == [
        "Batch normalization at learning rate 1 had the highest final test accuracy, 96.3 ± 0.6 % (mean ± standard "
        "deviation of 3 seeds), 0.3 points above group normalization at learning rate 0.1; not decided by 3 seeds: the "
        "95 % interval is −1.1 to +1.8 points.",
        "It was 5.3 points above no normalization at learning rate 0.1, which ended at 91.0 ± 1.0 %; 95 % interval "
        "+3.9 to +6.8 points over 3 seeds.",
        "Each norm is shown at the best of its 2 settings; as the test data decided which is best, these accuracies "
        "are slightly too high.",
        "Training diverged in 2 of 18 runs: none, lr 1.",
        "Reaching 90.0 % test accuracy took the fewest steps (20) with batch, lr 1 and the least time (20 ms) with "
        "group, lr 0.1; a training step took 1 ms (group, lr 0.1) to 2 ms (batch, lr 1).",
    ]


def test_a_choice_that_diverged_is_chosen_only_where_all_did():
    grid = grid_of("none", "batch", lr=(0.1, 1.0))
    risky = ending("batch", 0.99, 0.99, lr=1.0, grid=grid, diverged=(1,))
    safe = ending("batch", 0.5, 0.5, lr=0.1, grid=grid)
    assert contestants([risky, safe], grid) == [safe]
    lost = [ending("none", 0.1, 0.1, lr=lr, grid=grid, diverged=(0, 1)) for lr in grid.lr]
    assert contestants([*lost, risky], grid) == [lost[0], risky]
    assert "Training diverged in 5 of 6 runs: none, lr 0.1; none, lr 1 and batch, lr 1." in headline(
        [*lost, risky], grid, 0.9
    )


def test_the_headline_reports_that_every_run_diverged():
    grid = grid_of("none", "batch", "group")
    lost = [ending(norm, 0.1, 0.1, grid=grid, diverged=(0, 1)) for norm in grid.norm]
    assert headline(lost, grid, 0.9)[:2] == [
        "Training diverged with every choice and seed.",
        "Training diverged in 6 of 6 runs: none, batch and group.",
    ]


def test_the_reference_is_the_first_norm_at_its_best():
    found, grid = grid_outcomes()
    found[0], found[1] = found[1], found[0]
    assert reference(found, grid).label == "none, lr 0.1"
    rates = grid_of("batch", lr=(0.1, 1.0))
    alone = [ending("batch", 0.5, lr=0.1, grid=rates), ending("batch", 0.9, lr=1.0, grid=rates)]
    assert contestants(alone, rates) == alone
    assert reference(alone, rates) is alone[0]


def test_ways_to_draw_batches_are_not_chosen_among():
    grid = grid_of("batch", sampling=("iid", "classes:2"))
    choices = grid.choices
    found = [
        Outcome.of([make_run(c, 0, [0.1, 0.5])], grid.label(c), "", steps=10, epoch_steps=1, target_accuracy=0.9)
        for c in choices
    ]
    assert contestants(found, grid) == found


def test_eight_are_drawn_at_first_with_the_reference():
    norms = tuple(f"batch:eps={k}" for k in range(11))
    grid = grid_of("none", *norms)
    TITLES.update(dict.fromkeys(norms, "batch normalization"))
    found = [ending("none", 0.2, grid=grid), *(ending(norm, 0.5 + 0.01 * k, grid=grid) for k, norm in enumerate(norms))]
    assert [o.choice.norm for o in shown(found, grid)] == ["none", *norms[-7:]]
    text = headline(found, grid, 0.9)
    assert len(text) <= 5
    assert max(map(len, text)) < 300


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "+0.04"), (-0.04, "−0.04"), (-6e-15, "0"), (1.26, "+1.3"), (-12.0, "−12.0")]
)
def test_differences_do_not_round_to_nothing(value, text):
    assert points(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1023, "1023 bytes"), (253_000, "247 KiB"), (3 << 30, "3 GiB")],
)
def test_memory_has_a_fitting_unit(count, text):
    assert memory(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1234.5, "1,230 s"), (12.34, "12.3 s"), (0.0123, "12.3 ms"), (4.63e-4, "463 µs"), (0.0, "0 µs"), (0.9999, "1 s")],
)
def test_durations_have_a_fitting_unit(seconds, text):
    assert duration(seconds) == text
