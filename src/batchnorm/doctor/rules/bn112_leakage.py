"""BN112: a network that reads its answer off the batch."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.bn105_non_iid_batches import dependent
from batchnorm.doctor.rules.rule import Rule


class Leakage(Rule):
    """The same samples, normalized in other batches: what changes came from their neighbours."""

    code = "BN112"
    title = "the network reads its answer off the batch"
    why = (
        "Batch statistics carry what the samples of a batch have in common: their class, their pair, whether they are "
        "generated. A network that is trained on such batches learns to use it, as in contrastive learning and GANs; "
        "in evaluation it is not there."
    )
    repair = (
        "loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)\n"
        "# where batches have to be so, no statistics of the batch; then train again\n"
        "model, report = batchnorm.convert(model, torch.nn.GroupNorm, num_groups=8)"
    )
    needs = ("data", "output", "pass")

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Only where evaluation is worse than training, and stale statistics are not why."""
        paths = [layer.path for layer in probe.measured if layer.by_batch]
        gap = probe.gap
        if not paths or gap is None or gap.severity == Severity.NOTE:
            return
        # Independent samples change by the noise of other batches too; only a loss tells that from knowledge.
        stale = probe.off_by is None or probe.off_by.severity > Severity.NOTE
        if dependent(probe) is None and (stale or gap.loss is None):
            return
        effect = probe.neighbours
        if effect is None or effect.severity == Severity.NOTE:
            return
        yield self.finding(
            effect.severity,
            paths,
            f"the same samples in batches drawn anew: {effect}",
            evidence=[f"evaluation against training: {gap}"],
            confidence=effect.confidence,
            cost=effect.cost,
        )
