from __future__ import annotations

import inspect

import torch

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed


class WeightDecay(Rule):
    code = "BN203"
    title = "weight decay pulls γ and β to zero"
    why = """
        On weights before batch normalization, weight decay sets the effective step size. On γ and β, it shrinks the
        output itself. Recipes for long trainings exclude γ and β.
    """
    evidence = "The weight decay of the optimizer's groups that contain γ or β."
    severity = "A note: the model does not show whether it hurts."
    repair = "optimizer = torch.optim.AdamW(batchnorm.parameter_groups(model, weight_decay=0.05))"
    notes = "In the finding, this line has the given optimizer and its options."
    source = """
        Goyal et al. 2017, *Accurate, Large Minibatch SGD*, section 5.1; He et al. 2019, *Bag of Tricks*, section 3.1.
    """
    needs = ("optimizer",)

    def check(self, m: Measurements) -> Findings:
        assert m.optimizer is not None
        decay = {
            id(p): float(group.get("weight_decay", 0.0)) for group in m.optimizer.param_groups for p in group["params"]
        }
        found = {layer.path: max(decay.get(id(p), 0.0) for p in layer.affine) for layer in m.layers if layer.affine}
        found = {path: rate for path, rate in found.items() if rate > 0}
        if found:
            rates = sorted(set(found.values()))
            yield self.finding(
                Severity.NOTE,
                found,
                f"weight_decay={', '.join(f'{rate:g}' for rate in rates)} on {layers_listed(found)}",
                repair=_repair(m.optimizer, rates[-1]),
                weight_decay=found,
            )


def _repair(optimizer: torch.optim.Optimizer, rate: float) -> str:
    """Return code that makes the same optimizer, with its options."""
    kind = type(optimizer)
    known = getattr(torch.optim, kind.__name__, None) is kind
    name = f"torch.optim.{kind.__name__}" if known else kind.__name__
    imported = "" if known else f"from {kind.__module__} import {kind.__name__}\n"
    defaults = inspect.signature(kind).parameters
    chosen = {key: value for key, value in optimizer.defaults.items() if key in defaults and key != "weight_decay"}
    options = "".join(f", {key}={value!r}" for key, value in chosen.items() if value != defaults[key].default)
    return f"{imported}optimizer = {name}(batchnorm.parameter_groups(model, weight_decay={rate:g}){options})"
