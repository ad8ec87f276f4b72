"""The remaining time, on a clock that the tests turn."""

from __future__ import annotations

import re

import pytest

from batchnorm.compare.training.remaining import Costs, Planned, Remaining

COSTS = {"quick": Costs(0.5, 0.01, 1.0), "slow": Costs(0.5, 1.0, 1.0)}
PLAN = [Planned(kind, 200, 50) for kind in ("quick", "slow", "slow", "quick")]


class Clock:
    """A clock that stands still between steps."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def texts(factors: dict[str, float]) -> list[tuple[str, float]]:
    """Return the time shown after each step, and the true time of the rest; costs are wrong by these factors."""
    clock = Clock()
    remaining = Remaining(PLAN, COSTS, clock)
    ends = [factors[run.kind] * COSTS[run.kind].until(run.steps, run.interval) for run in PLAN]
    end, found = clock.now + sum(ends), []
    for run in PLAN:
        begun = clock.now
        remaining.begin()
        for step in range(1, run.steps + 1):
            clock.now = begun + factors[run.kind] * COSTS[run.kind].until(step, run.interval)
            remaining.step(step)
            found.append((remaining.text, end - clock.now))
        remaining.end()
    assert clock.now == pytest.approx(end)
    return found


def seconds(text: str) -> float:
    parts = re.fullmatch(r"(?:more than )?(?:(\d+) h )?(?:(\d+) min)? ?(?:(\d+) s)? left", text)
    assert parts, text
    hours, minutes, rest = (int(part or 0) for part in parts.groups())
    return 3600 * hours + 60 * minutes + rest


@pytest.mark.parametrize(
    "factors",
    [{"quick": 1, "slow": 1}, {"quick": 0.3, "slow": 0.5}, {"quick": 4, "slow": 1.7}, {"quick": 0.2, "slow": 3}],
)
def test_the_remaining_time_never_rises(factors: dict[str, float]) -> None:
    shown = [seconds(text) for text, _ in texts(factors)]
    assert shown == sorted(shown, reverse=True)
    assert shown[-1] == 0


def test_the_remaining_time_is_right_from_the_start_if_the_trial_was() -> None:
    """A quick run comes first: by its time per step alone, all would be ready a hundred times sooner."""
    for text, truly in texts({"quick": 1, "slow": 1}):
        assert "more" not in text
        assert seconds(text) == pytest.approx(truly, abs=0.51)


def test_a_plan_that_takes_longer_than_announced_becomes_a_lower_bound() -> None:
    found = texts({"quick": 1, "slow": 3})
    late = [(seconds(text), truly) for text, truly in found[210:395]]
    assert all(text.startswith("more than ") for text, _ in found[210:395])
    assert all(shown < truly for shown, truly in late)
    assert not found[-1][0].startswith("more")


def test_a_quicker_plan_is_announced_soon() -> None:
    found = texts({"quick": 1, "slow": 0.25})
    text, truly = found[299]  # halfway through the first slow run
    assert seconds(text) == pytest.approx(truly, rel=0.15)


def test_a_run_that_ends_early_leaves_its_steps_out() -> None:
    clock = Clock()
    remaining = Remaining(PLAN, COSTS, clock)
    for _ in (1, 2):
        remaining.begin()
        remaining.step(1)
        clock.now += 0.01
        remaining.end()
    remaining.begin()
    assert remaining.estimate < 2 * COSTS["slow"].until(200, 50)


def test_long_times_have_hours() -> None:
    remaining = Remaining([Planned("slow", 9_000, 9_000)], COSTS, Clock())
    remaining.begin()
    assert remaining.text == "2 h 30 min left"
