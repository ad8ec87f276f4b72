"""Prove that a folded network computes the same as the original, at every place that must keep its value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from batchnorm.models.execution.progress import Bar
from batchnorm.models.gate import Error, Results, relative
from batchnorm.surgery.fold.network import Call, Kind, Network, Value


class Wrong(NamedTuple):
    """A place at which the folded network's value is not the original's.

    Attributes:
        error: The errors there.
        calls: The calls that compute it in the folded network.
    """

    error: Error
    calls: Collection[Call]


class Proof(ABC):
    """Compares a folded network with the original, on the example's values and on random ones.

    Every place that must keep its value is computed in both networks from the original's values at the nearest other
    such places. The places are therefore proven one by one, in one run over the network: an error does not spread, and
    no layer hides it from the next.

    Args:
        original: The network before any fold.
        tolerance: The relative error that is allowed at one place, even if the original's own error is smaller than
            half of it.
        shown: The progress bar.
    """

    def __init__(self, original: Network, tolerance: float, shown: Bar) -> None:
        self._original, self._tolerance, self.shown = original, tolerance, shown

    @abstractmethod
    def compute(
        self, network: Network, given: Mapping[Value, Value], places: Sequence[Value], *, random: bool, wide: bool
    ) -> Iterable[Any]:
        """Yield the values at these places, in order.

        Args:
            network: The original or the folded network.
            given: The values that are not computed, each with the original's value that it is equal to.
            places: Values to compute, although they may be among the given ones.
            random: Whether the given values are random, instead of those of the example.
            wide: Whether to compute in float64.

        Raises:
            CannotFold: They cannot be computed.
        """

    def failures(self, network: Network, changed: Collection[Call]) -> list[Wrong]:
        """Return the places among the results of these calls, or after them, that are wrong.

        Raises:
            CannotFold: The places cannot be computed.
        """
        given = network.originals()
        places = _places(network, given, changed)
        ends = [given[place] for place in places]
        kept = {value: value for value in given.values()}
        errors: dict[int, list[Error]] = {}
        for random in (False, True):
            if random or self._original.pinned:
                own = self.compute(self._original, kept, ends, random=random, wide=False)
            else:
                own = (self._original.values[end] for end in ends)
            folded = self.compute(network, given, places, random=random, wide=False)
            pairs = self.shown.over(zip(own, folded, strict=True), "comparing", len(places))
            for i, pair in enumerate(pairs):
                # Within half the tolerance of the original, the error is within the tolerance, or within twice the
                # original's error, whatever the exact value.
                if relative(*pair[::-1]) > 0.5 * self._tolerance:
                    exact = self.compute(self._original, kept, ends[i : i + 1], random=random, wide=True)
                    errors.setdefault(i, []).append(Error.of(Results(pair[:1], pair[1:], list(exact))))
        worst = {i: Error.worst(found) for i, found in errors.items()}
        return [
            Wrong(error, region(network, given, places[i : i + 1]))
            for i, error in worst.items()
            if not error.allowed(self._tolerance)
        ]


def region(network: Network, given: Collection[Value], places: Iterable[Value]) -> list[Call]:
    """Return the calls that compute these places from the given values, in order."""
    found: set[Call] = set()
    left = list(places)
    while left:
        call = network.writer(left.pop())
        if call is not None and call not in found:
            found.add(call)
            left += [value for value in (*call.inputs, *call.captured) if value not in given]
    return [call for call in network.calls if call in found]


def _places(network: Network, given: Mapping[Value, Value], changed: Collection[Call]) -> list[Value]:
    """Return the first values after changed calls that must be the original's."""
    affected: set[Value] = set()
    places = []
    for call in network.calls:
        if call.gone or call.kind is Kind.SIZE or not (call in changed or affected.intersection(call.inputs)):
            continue
        for value in call.results:
            if value in given:
                places.append(value)
            else:
                affected.add(value)
    return places
