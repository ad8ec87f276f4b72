"""BN101: evaluation is worse than training on the same batches."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.cause import suspects
from batchnorm.doctor.measure.effect import OUTPUT_MATTERS, Effect
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# What makes training and evaluation differ.
_CAUSES = ("BN102", "BN103", "BN104", "BN105", "BN109", "BN111", "BN112", "BN201", "BN202", "BN204")


class TrainEvaluationGap(Rule):
    """The same batches and weights, dropout off in both: what differs is the statistics alone."""

    code = "BN101"
    title = "evaluation differs from training on the same batches"
    why = (
        "Training normalizes by the batch, evaluation by the running statistics. Where the two differ on the same "
        "data, the network that is evaluated is not the one that was trained."
    )
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    needs = ("data", "output")
    last = True

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the gap in loss; without a loss by that of the output which the running statistics account for."""
        gap, off_by, batches = probe.gap, probe.off_by, probe.batch_effect
        if gap is None or off_by is None or batches is None or gap.output <= OUTPUT_MATTERS:
            return
        if gap.loss is not None:
            if gap.loss <= 0 or (gap.loss_interval is not None and gap.loss_interval[0] <= 0):
                return
        elif off_by.output < batches.output:
            return  # what differs are the batches' statistics, not the running ones
        evidence = [f"running statistics against the population's: {off_by}",
                    f"batches' statistics against the population's: {batches}"]  # fmt: skip
        ranked = [
            (_explained(probe.explained([found.layer]), off_by), found.layer.path) for found in suspects(probe, off_by)
        ]
        ranked.sort(key=lambda pair: -pair[0] if pair[0] is not None else 0.0)
        what = "what the loss has too much" if _in_loss(off_by) else "the change of the output"
        evidence += [
            f"{path or '(model)'}: the population's statistics in it alone take away {share:.0%} of {what}"
            for share, path in ranked
            if share is not None
        ]
        paths = [path for _, path in ranked]
        yield self.finding(
            gap.severity, paths, f"evaluation against training: {gap}", evidence=evidence, confidence=gap.confidence,
            cost=gap.cost, repair=self._repair(probe), loss=gap.loss, output=gap.output, samples=gap.samples,
            batches=gap.batches,
        )  # fmt: skip

    def _repair(self, probe: Probe) -> str | None:
        """Where its causes were found, theirs."""
        told = [f for f in probe.found if f.severity > Severity.NOTE or f.code in ("BN102", "BN103")]
        causes = sorted({finding.code for finding in told if finding.code in _CAUSES})
        return f"# see what was found on its causes: {', '.join(causes)}" if causes else None


def _in_loss(whole: Effect) -> bool:
    return whole.loss is not None and whole.loss > 0


def _explained(left: Effect | None, whole: Effect) -> float | None:
    """The share of the whole that is gone; None where it was not measured."""
    if left is None:
        return None
    if _in_loss(whole):
        assert left.loss is not None and whole.loss is not None
        return 1 - left.loss / whole.loss
    return 1 - left.output / max(whole.output, 1e-30)
