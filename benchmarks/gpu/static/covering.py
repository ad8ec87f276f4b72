"""Choose a few combinations of many factors so that all combinations of any few of them occur."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

Choice = dict[str, Any]
_Values = tuple[tuple[str, int], ...]  # factors, each with the position of a value


def covering(factors: dict[str, Sequence[Any]], strength: int) -> list[Choice]:
    """Return choices of a value for each factor in which all combinations of `strength` factors' values occur.

    A greedy search, which always returns the same choices: about as many as the values of the `strength` largest
    factors have combinations, times a logarithm.
    """
    strength = min(strength, len(factors))
    # A dict is an ordered set.
    missing = dict.fromkeys(_tuples({name: range(len(values)) for name, values in factors.items()}, strength))
    found = []
    while missing:
        chosen = dict(next(iter(missing)))
        for name, values in factors.items():
            if name not in chosen:
                others = list(itertools.combinations(sorted(chosen.items()), strength - 1))
                chosen[name] = max(
                    range(len(values)),
                    key=lambda i, name=name, others=others: sum(  # type: ignore[misc]
                        tuple(sorted((*other, (name, i)))) in missing for other in others
                    ),
                )
        for covered in itertools.combinations(sorted(chosen.items()), strength):
            missing.pop(covered, None)
        found.append({name: values[chosen[name]] for name, values in factors.items()})
    return found


def _tuples(positions: dict[str, range], strength: int) -> Iterator[_Values]:
    for names in itertools.combinations(sorted(positions), strength):
        for values in itertools.product(*(positions[name] for name in names)):
            yield tuple(zip(names, values, strict=True))
