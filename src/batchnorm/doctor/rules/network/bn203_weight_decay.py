from __future__ import annotations

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
        assert m.optimizer_code is not None
        found = {layer.path: layer.weight_decay for layer in m.layers if layer.weight_decay > 0}
        if found:
            rates = sorted(set(found.values()))
            yield self.finding(
                Severity.NOTE,
                found,
                f"weight_decay={', '.join(f'{rate:g}' for rate in rates)} on {layers_listed(found)}",
                repair=m.optimizer_code,
                weight_decay=found,
            )
