"""One fold, computed before and after on the same values, in float64 and in the model's own dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from batchnorm.surgery.fold.arithmetic import rounded
from batchnorm.surgery.fold.pytorch.plans import Constant, Network, Plan
from batchnorm.surgery.fold.states import State

# What a fold may err by, relative to the largest value, where the model's own arithmetic errs by less than half of it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Error:
    """How far results are from float64, relative to the largest value.

    Attributes:
        before: Of the model as it was.
        after: Of the folded one.
    """

    before: float
    after: float

    def allowed(self, tolerance: float, times: float = 1.0) -> bool:
        """Whether folding errs by no more than so many times the tolerance, or twice what the model itself does."""
        return self.after <= times * max(tolerance, 2.0 * self.before)


def relative(found: Tensor, exact: Tensor) -> float:
    """`max|found - exact| / max|exact|`; infinite where one is not finite and the other is."""
    found, exact = found.double(), exact.double()
    finite = exact.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = exact[finite].abs().max().item()
    difference = (found[finite] - exact[finite]).abs().max().item()
    return difference / largest if largest else difference


def _evaluate(
    region: list[Node], boundary: Mapping[Node, Any], states: Mapping[Node, State | Constant], dtype: torch.dtype
) -> dict[Node, Any]:
    values: dict[Node, Any] = {
        node: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for node, value in boundary.items()
    }
    with torch.no_grad():
        for node in region:
            state = states.get(node)
            if isinstance(state, Constant):
                value = state.value if dtype == torch.float64 else rounded(state.value, state.like).to(dtype)
                values[node] = value.to(state.like.device)
            elif state is not None:
                values[node] = state(values[state.source])
            else:
                assert callable(node.target)
                args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _random(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)


def try_plan(plan: Plan) -> tuple[Error, dict[Node, Any]]:
    """The fold's error on the example's values and on random ones, and the values that it changes.

    Raises:
        arithmetic.NotRepresentable: A weight is not finite in its dtype.
    """
    network: Network = plan.network
    region = sorted({*plan.states, *plan.through, *plan.same}, key=network.order.__getitem__)
    inside = set(region)
    after = {**network.states, **plan.states}
    before: dict[Node, Any] = dict(network.states)
    for node in region:
        if node.op == "get_attr" and node not in before:  # a constant that is going to change
            value = network.attribute(node)
            before[node] = Constant(value.double().cpu(), value, str(node.target))
    boundary: dict[Node, Any] = {}
    for node in region:
        states = [s for s in (before.get(node), after.get(node)) if s is not None and not isinstance(s, Constant)]
        sources = [s.source for s in states] if states else node.all_input_nodes
        for source in sources:
            if source not in inside:
                boundary[source] = network.values[source]
    dtype = network.values[plan.same[0]].dtype
    generator = torch.Generator().manual_seed(0)
    errors, changed = [], {}
    for attempt in (boundary, {node: _random(value, generator) for node, value in boundary.items()}):
        exact = _evaluate(region, attempt, before, torch.float64)
        own = _evaluate(region, attempt, before, dtype)
        folded = _evaluate(region, attempt, after, dtype)
        if attempt is boundary:
            changed = {node: folded[node] for node in region}
        errors.append(
            Error(
                max(relative(own[node], exact[node]) for node in plan.same),
                max(relative(folded[node], exact[node]) for node in plan.same),
            )
        )
    worst = max(errors, key=lambda e: e.after - 2.0 * e.before)
    return worst, changed
