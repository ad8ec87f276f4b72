"""Search for layers that absorb each batch normalization, in any kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from batchnorm.models.gate import Error, Results
from batchnorm.models.report import Change
from batchnorm.surgery.fold.arithmetic import NotRepresentable
from batchnorm.surgery.fold.branches import merged
from batchnorm.surgery.fold.network import Call, Kind, Network, Value
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.states import CannotFold


class Trial(NamedTuple):
    """The effect of a plan's change, computed before and after.

    Attributes:
        runs: The values that must not change, for the example and for random inputs.
        values: The new values of the tensors that the plan touches, for the example.
    """

    runs: Sequence[Results]
    values: Mapping[Value, Any]


class Search:
    """Fold as much as possible in a network.

    Attributes:
        absorbed: The batch normalizations that were removed, each with the calls that absorbed it.
        reasons: The reason why each other batch normalization stays.
    """

    def __init__(self, network: Network, tolerance: float, run: Callable[[FoldPlan], Trial]) -> None:
        self.absorbed: dict[Call, list[Call]] = {}
        self.reasons: dict[Call, str] = dict(network.unfoldable)
        self._network, self._tolerance, self._run = network, tolerance, run

    def fold_all(self) -> None:
        """Change the network until nothing more can be folded."""
        while self._fold_norms() | self._merge_branches():
            pass

    def rows(
        self, places: Mapping[Call, str], names: Mapping[Call, str], fused: Mapping[Any, str]
    ) -> tuple[list[Change], list[Change]]:
        """Return a row for each batch normalization: first the removed and fused ones, then the ones that stay.

        Args:
            places: The name of each call for the report.
            names: The type of each batch normalization.
            fused: The nodes that became one operation with others, and a description of these.
        """
        changed, left = [], []
        for call in self._network.calls:
            if call not in self.absorbed and call not in self.reasons:
                continue
            norm = self._network.norms.get(call)
            was = names[call] if norm is None else f"{names[call]}({norm.in_channels})"
            if call in self.absorbed:
                into = ", ".join(dict.fromkeys(places[layer] for layer in self.absorbed[call]))
                changed.append(Change(places[call], was, f"in {into}"))
            elif call.node in fused:
                changed.append(Change(places[call], was, f"fused with {fused[call.node]}", self.reasons[call]))
            else:
                left.append(Change.unchanged(places[call], was, self.reasons[call]))
        return changed, left

    def _fold_norms(self) -> bool:
        """Try to fold every batch normalization once, backward and then forward. Return whether one was folded."""
        before = len(self.absorbed)
        for call in (call for call in self._network.norms if not call.gone):
            why = []
            for direction in (FoldPlan.backward, FoldPlan.forward):
                try:
                    self.absorbed[call] = self._carry_out(direction(self._network, call))
                    break
                except (CannotFold, NotRepresentable) as error:
                    why.append(str(error))
            else:
                self.reasons[call] = "; ".join(dict.fromkeys(why))
        return len(self.absorbed) > before

    def _merge_branches(self) -> bool:
        """Try to merge the terms of every addition once. Return whether some were merged."""
        found = False
        for call in self._network.calls:
            if call.gone or call.kind not in (Kind.SUM, Kind.DIFFERENCE):
                continue
            try:
                plan = merged(self._network, call)
                self._carry_out(plan)
            except (CannotFold, NotRepresentable):
                continue
            found = True
            for norm, where in self.absorbed.items():
                self.absorbed[norm] = [call if place in plan.gone else place for place in where]
            self.absorbed.update({branch: [call] for branch in plan.gone if branch in self._network.norms})
        return found

    def _carry_out(self, plan: FoldPlan) -> list[Call]:
        """Make the change if its error is small enough. Return the calls that absorb the batch normalization.

        Raises:
            CannotFold: The error is too large.
        """
        trial = self._run(plan)
        error = Error.worst(trial.runs)
        if not error.allowed(self._tolerance):
            raise CannotFold(f"folding it has an error of {error.after:.1e}, the layer itself of {error.before:.1e}")
        plan.carry_out(trial.values)
        return plan.absorbers
