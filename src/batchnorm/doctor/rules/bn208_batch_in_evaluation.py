from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed


class BatchInEvaluation(Rule):
    code = "BN208"
    title = "evaluation normalizes by the batch"
    why = """
        Without running statistics (track_running_stats=False), the result for a sample depends on the other samples of
        its batch in evaluation, too. A single sample, or a batch of one class, loses its information. The layer cannot
        be folded.
    """
    evidence = "Layers without a running mean."
    severity = "A note: it may be intended."
    repair = """
        for found in batchnorm.walk.norm_layers(model):
            layer = found.module
            layer.track_running_stats = True
            layer.running_mean = torch.zeros(layer.num_features)
            layer.running_var = torch.ones(layer.num_features)
            layer.num_batches_tracked = torch.tensor(0)
        model, report = batchnorm.recalibrate(model, training_data)
    """
    source = "PyTorch's documentation of `BatchNorm2d`."

    def check(self, m: Measurements) -> Findings:
        found = [layer.path for layer in m.layers if getattr(layer.module, "running_mean", None) is None]
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{counted(len(found), 'layer keeps', 'layers keep')} no running statistics: {listed(found)}",
            )
