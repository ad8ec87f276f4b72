"""BN208: layers that normalize by the batch in evaluation too."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class BatchInEvaluation(Rule):
    """A note, as it may be meant so."""

    code = "BN208"
    title = "evaluation normalizes by the batch"
    why = (
        "Without running statistics (track_running_stats=False) a sample's result depends on which others are in its "
        "batch, in evaluation too; a single sample, or one batch of one class, is normalized to nothing. Nothing can "
        "be folded."
    )
    repair = (
        "for found in batchnorm.walk.norm_layers(model):\n"
        "    layer = found.module\n"
        "    layer.track_running_stats = True\n"
        "    layer.running_mean = torch.zeros(layer.num_features)\n"
        "    layer.running_var = torch.ones(layer.num_features)\n"
        "    layer.num_batches_tracked = torch.tensor(0)\n"
        "model, report = batchnorm.recalibrate(model, training_data)"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Layers without a running mean."""
        found = [layer.path for layer in probe.layers if getattr(layer.module, "running_mean", None) is None]
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{counted(len(found), 'layer keeps', 'layers keep')} no running statistics: {listed(found)}",
            )
