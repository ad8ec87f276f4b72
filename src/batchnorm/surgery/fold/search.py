"""The search for a place for each batch normalization: back in the graph, else on, in any kind of graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple

from batchnorm.surgery.fold.arithmetic import NotRepresentable
from batchnorm.surgery.fold.branches import merged
from batchnorm.surgery.fold.gate import Error, Results
from batchnorm.surgery.fold.network import C, Kind, Network, V
from batchnorm.surgery.fold.plan import FoldPlan
from batchnorm.surgery.fold.states import CannotFold


class Trial(NamedTuple, Generic[V]):
    """What a plan's change does, computed before and after.

    Attributes:
        runs: The values that must not change, for the example and for random inputs.
        values: The new values of the tensors that the plan touches, for the example.
    """

    runs: Sequence[Results]
    values: Mapping[V, Any]


class Search(Generic[V, C]):
    """Folds all that can be folded in a network.

    Attributes:
        taken: The batch normalizations that are gone, each with the calls that took it up.
        reasons: Why others stay.
    """

    def __init__(self, network: Network[V, C], tolerance: float, run: Callable[[FoldPlan[V, C]], Trial[V]]) -> None:
        self.taken: dict[C, list[C]] = {}
        self.reasons: dict[C, str] = dict(network.unfoldable)
        self._network, self._tolerance, self._run = network, tolerance, run

    def fold_all(self) -> None:
        """Change the network until nothing more can be folded."""
        while self._fold_norms() | self._merge_branches():
            pass

    def _fold_norms(self) -> bool:
        """Try every batch normalization once. Return whether one was folded."""
        before = len(self.taken)
        for call in list(self._network.norms):
            if call in self._network.gone:
                continue
            why = []
            for direction in (FoldPlan.back, FoldPlan.on):
                try:
                    plan = direction(self._network, call)
                    self._carry_out(plan)
                except (CannotFold, NotRepresentable) as error:
                    why.append(str(error))
                else:
                    self.taken[call] = plan.where
                    break
            else:
                self.reasons[call] = "; ".join(dict.fromkeys(why))
        return len(self.taken) > before

    def _merge_branches(self) -> bool:
        """Try every addition of branches once. Return whether two were merged."""
        network, before = self._network, len(self._network.gone)
        for call in network.alive():
            if network.subtracts(call) is None or network.kind(call) is Kind.LINEAR:
                continue
            try:
                plan = merged(network, call)
                self._carry_out(plan)
            except (CannotFold, NotRepresentable):
                continue
            for norm, where in self.taken.items():
                self.taken[norm] = [call if place in plan.gone else place for place in where]
            self.taken.update({branch: [call] for branch in plan.gone if branch in network.norms})
        return len(network.gone) > before

    def _carry_out(self, plan: FoldPlan[V, C]) -> None:
        """Make the change if it errs little enough.

        Raises:
            CannotFold: It errs by more.
        """
        trial = self._run(plan)
        error = Error.worst(trial.runs)
        if not error.allowed(self._tolerance):
            raise CannotFold(f"folding it errs by {error.after:.1e}, and the layer itself by {error.before:.1e}")
        plan.carry_out(trial.values)
