"""BN209: running statistics that move in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class MovesInEvaluation(Rule):
    """Seen in the first batch of the pass in evaluation."""

    code = "BN209"
    title = "running statistics move in evaluation"
    why = (
        "A layer of one's own that calls batch_norm with training=True whatever its mode, or code that calls train() "
        "within forward, changes the network with every evaluation: results depend on what was evaluated before."
    )
    repair = "# in that layer's forward: F.batch_norm(..., training=self.training)"
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Layers whose running statistics are others after an evaluation."""
        found = [layer.path for layer in probe.measured if layer.moved_in_evaluation]
        if found:
            yield self.finding(Severity.WARNING, found, f"{counted(len(found), 'layer')}: {listed(found)}")
