from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import layers_listed


class MovesInEvaluation(Rule):
    code = "BN209"
    title = "evaluation updates the running statistics"
    why = """
        Every evaluation changes the network if a custom layer calls batch_norm with training=True in every mode, or if
        forward calls train(). Results then depend on earlier evaluations.
    """
    evidence = "The running statistics before and after the first batch in evaluation."
    severity = "A warning: two evaluations give two results."
    repair = "# pass training=self.training to F.batch_norm, in the forward of that layer"
    source = "PyTorch's documentation of `torch.nn.functional.batch_norm`."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        found = [layer.path for layer in m.measured if layer.moved_in_evaluation]
        if found:
            yield self.finding(Severity.WARNING, found, f"{layers_listed(found)}")
