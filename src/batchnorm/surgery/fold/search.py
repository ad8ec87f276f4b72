"""Search for layers that absorb each batch normalization, in any kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from batchnorm.models.gate import Error
from batchnorm.models.report import Change
from batchnorm.surgery.fold.arithmetic import NotRepresentable
from batchnorm.surgery.fold.branches import merged
from batchnorm.surgery.fold.network import Call, Kind, Network
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.proof import Proof
from batchnorm.surgery.fold.states import CannotFold

Attempt = tuple[Call, str]  # a call, and the name of the function that plans its fold


class Search:
    """Fold as much as possible in a network.

    All folds are made first, and proven together. If that fails at a place, the search starts again, and proves each
    fold near that place before it makes the next.

    Attributes:
        absorbed: The batch normalizations that were removed, each with the calls that absorbed it.
        reasons: The reason why each other batch normalization stays.
    """

    def __init__(self, network: Network, proof: Proof) -> None:
        self.absorbed: dict[Call, list[Call]] = {}
        self.reasons: dict[Call, str] = {}
        self._network, self._proof = network, proof
        self._copies: dict[Call, list[Call]] = {}  # as `absorbed`, for those that other calls still read
        self._made: dict[Attempt, set[Call]] = {}  # with the calls that each changed
        self._doubtful: set[Attempt] = set()  # must be proven one by one

    def fold_all(self) -> None:
        """Change the network until nothing more can be folded."""
        start = self._network.saved()
        while True:
            self.absorbed, self.reasons, self._made = {}, dict(self._network.unfoldable), {}
            self._copies = {}
            while self._fold_norms() | self._merge_branches():
                pass
            doubtful = self._unproven()
            if not doubtful:
                return
            self._doubtful |= doubtful
            start()

    def _unproven(self) -> set[Attempt]:
        """Return the folds that were made together, and not one by one, where the result is wrong."""
        together = {attempt for attempt in self._made if attempt not in self._doubtful}
        try:
            wrong = self._proof.failures(self._network, set().union(*(self._made[each] for each in together)))
        except CannotFold:
            return together
        return {each for each in together if any(self._made[each].intersection(found.calls) for found in wrong)}

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
        left = [call for call in self._network.norms if not call.gone]
        for call in self._proof.shown.over(left, "folding", len(left)):
            if call.gone:
                continue
            why = []
            for direction in (FoldPlan.backward, FoldPlan.forward):
                try:
                    self._absorb(call, self._made_plan(call, direction).absorbers)
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
                plan = self._made_plan(call, merged)
            except (CannotFold, NotRepresentable):
                continue
            found = True
            for places in (*self.absorbed.values(), *self._copies.values()):
                places[:] = [call if place in plan.gone else place for place in places]
            for norm in plan.copied:
                self._copies.setdefault(norm, []).append(call)
            for branch in plan.gone:
                if branch in self._network.norms:
                    self._absorb(branch, [call])
        return found

    def _absorb(self, norm: Call, absorbers: list[Call]) -> None:
        self.absorbed[norm] = [*self._copies.pop(norm, ()), *absorbers]

    def _made_plan(self, call: Call, planned: Callable[[Network, Call], FoldPlan]) -> FoldPlan:
        """Plan a fold, make it, and prove it if a proof of all folds together has failed there. Return the plan.

        Raises:
            CannotFold: It is impossible, or its error is too large. Nothing is changed.
            NotRepresentable: A new weight is not finite in its dtype. Nothing is changed.
        """
        plan = planned(self._network, call)
        changed = {*plan.states, *plan.through}
        attempt = (call, planned.__name__)
        undo = self._network.saved() if attempt in self._doubtful else None
        plan.carry_out()
        if undo is not None:
            try:
                self._prove(changed)
            except BaseException:
                undo()
                raise
        self._made.setdefault(attempt, set()).update(changed)
        return plan

    def _prove(self, changed: set[Call]) -> None:
        wrong = self._proof.failures(self._network, changed)
        if wrong:
            error = Error.worst(found.error for found in wrong)
            raise CannotFold(f"folding it has an error of {error.after:.1e}, the layer itself of {error.before:.1e}")
