from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed


class MovesInEvaluation(Rule):
    code = "BN209"
    title = "evaluation updates the running statistics"
    why = """
        A custom layer that calls batch_norm with training=True in every mode, or code that calls train() within
        forward, changes the network with every evaluation: results depend on what was evaluated before.
    """
    evidence = "The running statistics after the first batch in evaluation, against those before it."
    severity = "A warning: two evaluations give two results."
    repair = "# in the forward of that layer: F.batch_norm(..., training=self.training)"
    source = "PyTorch's documentation of `torch.nn.functional.batch_norm`."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        found = [layer.path for layer in m.measured if layer.moved_in_evaluation]
        if found:
            yield self.finding(Severity.WARNING, found, f"{layers_listed(found)}")
