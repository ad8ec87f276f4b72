from __future__ import annotations

import io

from rich.console import Console

from batchnorm.compare.training import progress
from batchnorm.compare.training.progress import Bar, Display, Lines


class Remaining:
    """Records every step, and always estimates the same time."""

    text = "55 s left"

    def __init__(self) -> None:
        self.told: list[object] = []

    def begin(self) -> None:
        self.told.append("begin")

    def step(self, step: int) -> None:
        self.told.append(step)

    def end(self) -> None:
        self.told.append("end")


def test_a_bar_shows_run_loss_and_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0)
    with Bar(Console(file=screen, force_terminal=True, width=120), runs=2, steps=10, remaining=Remaining()) as bar:
        bar.begin("none, seed 0", 4)
        bar.step(2, 0.5)
        assert "none, seed 0 (1 of 2)" in screen.getvalue()
        assert "2/10" in screen.getvalue()
        assert "loss 0.500" in screen.getvalue()
        assert "55 s left" in screen.getvalue()
        bar.end("diverged")
        bar.begin("batch, seed 0", 6)
        bar.step(3, float("nan"))
        assert "7/10" in screen.getvalue()
    assert "none, seed 0: diverged" in screen.getvalue()


def test_lines_are_few_and_plain(monkeypatch):
    screen, times = io.StringIO(), iter([0.0, 0.0, 1.0, 11.0, 12.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    remaining = Remaining()
    with Lines(Console(file=screen, width=20), runs=2, steps=12, remaining=remaining) as lines:
        lines.begin("none, seed 0", 4)
        lines.step(1, 0.9)
        lines.step(2, 0.5)
        lines.step(3, 0.4)
        lines.end("test accuracy 90.0 %")
        lines.begin("batch, seed 0", 8)
        lines.step(1, 0.7)
    assert screen.getvalue().splitlines() == [
        "[1/2] none, seed 0: step 2 of 4, loss 0.500, 55 s left",
        "[1/2] none, seed 0: test accuracy 90.0 %",
    ]
    assert remaining.told == ["begin", 1, 2, 3, "end", "begin", 1]


def test_the_display_fits_where_it_is_shown():
    assert type(progress.display(False, 1, 1, Remaining())) is Display
    assert isinstance(progress.display(True, 1, 1, Remaining()), Lines)  # the tests' standard error is not a terminal
