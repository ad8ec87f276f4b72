"""BN105: the samples of a batch are alike."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.measure.between import Spread
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

_RARE = 0.01
# Variance between batches over what sampling gives, in the mean over the channels, that is worth a word.
_INFLATED = 1.5


def dependent(probe: Probe) -> Spread | None:
    """The spread between batches, where it is more than sampling gives."""
    spread = probe.spread
    if spread is None or spread.p > _RARE or not len(spread.inflation) or float(spread.inflation.mean()) < _INFLATED:
        return None
    return spread


class NonIidBatches(Rule):
    """Batches that differ more than random ones would."""

    code = "BN105"
    title = "batches are not independent samples of the data"
    why = (
        "Batches sorted by class, drawn for metric learning, or cut from one video have statistics of their own. The "
        "network learns to use them, and the running statistics, an average over batches, miss the spread between "
        "them."
    )
    repair = (
        "loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)\n"
        "# where batches have to be so: exact statistics for evaluation, or none of the batch: batchnorm.convert\n"
        "model, report = batchnorm.recalibrate(model, training_data)"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By analysis of variance, corrected over all channels."""
        spread, effect = dependent(probe), probe.batch_effect
        paths = [layer.path for layer in probe.measured if layer.by_batch]
        if spread is None or effect is None or probe.data is None or not paths:
            return
        inflation = float(spread.inflation.mean())
        gap = probe.gap
        evidence = [
            f"of {spread.permutations} random orders of the samples, {round(spread.p * (spread.permutations + 1)) - 1} "
            "spread as much in their largest channel",
            f"by the batches' statistics against the population's: {effect}",
        ]
        # Better by its own batch is as bad: that knowledge is not there in evaluation.
        uses = gap is not None and gap.loss is not None and gap.severity > effect.severity
        worse = gap if uses and gap is not None else effect
        yield self.finding(
            worse.severity,
            paths,
            f"the means of batches vary {inflation:.3g} times as much as those of random ones would "
            f"(p = {spread.p:.2g}, {len(probe.data.sizes)} batches of {probe.batch_size:g})",
            evidence=evidence,
            confidence=worse.confidence,
            cost=worse.cost,
            inflation=inflation,
            p=spread.p,
        )
