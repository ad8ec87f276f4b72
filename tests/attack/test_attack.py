"""A moment of every attack; `make attack` runs each for a minute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack import files, interruptions, operators, ranks, values
from tests.attack.tally import Tally

ATTACKS: dict[str, tuple[int, Callable[[Tally, Path], None]]] = {
    "values": (100, lambda tally, _: values.attack(tally)),
    "operators": (200, lambda tally, _: operators.attack(tally)),
    "interruptions": (20, lambda tally, _: interruptions.attack(tally)),
    "damaged": (20, files.attack_damaged),
    "writing": (3, files.attack_writing),
    "ranks": (6, ranks.attack),
}


@pytest.mark.filterwarnings("ignore")  # of torch about damaged files and about forks
@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_fails(name: str, tmp_path: Path) -> None:
    at_least, attack = ATTACKS[name]
    tally = Tally(seconds=1.0, at_least=at_least)
    attack(tally, tmp_path)
    assert not tally.failures
    assert tally.tried >= at_least


def test_a_wrong_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    batch_norm = values.functional.batch_norm
    monkeypatch.setattr(values.functional, "batch_norm", lambda x, *rest, **more: batch_norm(x, *rest, **more) * 1.001)
    tally = Tally(seconds=0.0, at_least=20)
    values.attack(tally)
    assert len(tally.failures) > 5


def test_a_try_can_be_repeated_alone() -> None:
    whole, alone = Tally(seconds=0.0, at_least=3), Tally(seconds=0.0, only=2)
    drawn = [(number, rng.integers(1000)) for tally in (whole, alone) for number, rng in _first(tally, 3)]
    assert drawn[2] == drawn[-1]


def _first(tally: Tally, count: int) -> list[tuple[int, object]]:
    found = []
    for number, rng in tally.tries():
        found.append((number, rng))
        tally.tried += 1
        if len(found) == count:
            break
    return found
