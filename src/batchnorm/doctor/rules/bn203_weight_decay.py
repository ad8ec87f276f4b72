"""BN203: weight decay on γ and β."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class WeightDecay(Rule):
    """Always a note: whether it hurts cannot be seen in a model."""

    code = "BN203"
    title = "weight decay pulls γ and β to zero"
    why = (
        "On weights before batch normalization weight decay sets the effective step size; on γ and β it shrinks the "
        "output itself. Recipes that train longest leave them out."
    )
    repair = "optimizer = torch.optim.AdamW(batchnorm.parameter_groups(model, weight_decay=0.05))"
    needs = ("optimizer",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """In the optimizer's groups."""
        assert probe.optimizer is not None
        decay = {
            id(p): float(group.get("weight_decay", 0.0))
            for group in probe.optimizer.param_groups
            for p in group["params"]
        }
        found = {layer.path: max(decay.get(id(p), 0.0) for p in layer.affine) for layer in probe.layers if layer.affine}
        found = {path: rate for path, rate in found.items() if rate > 0}
        if found:
            rates = sorted(set(found.values()))
            yield self.finding(
                Severity.NOTE,
                found,
                f"weight_decay={', '.join(f'{rate:g}' for rate in rates)} on {counted(len(found), 'layer')}: "
                f"{listed(found)}",
                repair=_repair(probe.optimizer, rates[-1]),
                weight_decay=found,
            )


def _repair(optimizer: torch.optim.Optimizer, rate: float) -> str:
    """The same optimizer, with what was chosen in it."""
    kind = type(optimizer)
    name = f"torch.optim.{kind.__name__}" if hasattr(torch.optim, kind.__name__) else kind.__name__
    usual = inspect.signature(kind).parameters
    chosen = {key: value for key, value in optimizer.defaults.items() if key in usual and key != "weight_decay"}
    options = "".join(f", {key}={value!r}" for key, value in chosen.items() if value != usual[key].default)
    return f"optimizer = {name}(batchnorm.parameter_groups(model, weight_decay={rate:g}){options})"
