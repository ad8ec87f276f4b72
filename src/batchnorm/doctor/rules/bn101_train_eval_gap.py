from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.rules.rule import Finding, Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named

# Rules that explain a gap between training and evaluation. For the first two, a note is enough.
_CAUSES = ("BN102", "BN103", "BN104", "BN105", "BN109", "BN111", "BN112", "BN201", "BN202", "BN204", "BN216")


class TrainEvaluationGap(Rule):
    code = "BN101"
    title = "evaluation differs from training on the same batches"
    why = """
        Training normalizes by the batch, evaluation by the running statistics. If the two differ on the same data, the
        evaluated network is not the one that was trained.
    """
    evidence = """
        Every batch goes through the network twice: normalized by its own statistics, and by the running ones. Dropout
        is off both times, so nothing else differs. A third pass, normalized by the population's statistics, splits the
        gap in two:

        - running statistics against the population's: the effect of wrong running statistics (BN102, BN103, BN109);
        - batches' statistics against the population's: the gain or loss from the other samples of the batch (BN104,
          BN105).

        Layers whose running statistics are off are ranked. For each of the worst ones (`budget=`), one more pass uses
        the population's statistics in that layer alone, and measures how much of the excess loss this removes. Passes
        that other rules need come first.
    """
    severity = """
        Decided by the loss in evaluation minus the loss in training: a warning if the loss grows by 10 % and the output
        changes by 10 %, an error from 50 % and 30 %. The lower end of the 95 % interval over the batches counts.
    """
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    repair_keras = "model, report = batchnorm.keras.recalibrate(model, training_data)"
    notes = "If a cause was found, the finding names its code instead of this fix. Fix that cause first."
    source = """
        Ioffe & Szegedy 2015, *Batch Normalization*, section 3.1; Wu & Johnson 2021, *Rethinking “Batch” in BatchNorm*,
        section 4.
    """
    needs = ("data", "output")

    def check(self, m: Measurements) -> Findings:
        gap, whole = m.gap, m.running_effect
        if gap is None or whole is None or not m.gap_matters:
            return
        removed = {path: _removed(left, whole) for path, left in m.left_by_layer.items()}
        ranked = sorted(removed, key=lambda path: -removed[path])
        excess = "the excess loss" if _in_loss(whole) else "the change of the output"
        yield self.finding(
            gap.severity,
            [*ranked, *(path for path in (m.misfit.paths if m.misfit else ()) if path not in removed)],
            f"evaluation against training: {gap}",
            effect=gap,
            evidence=[
                f"running statistics against the population's: {whole}",
                f"batches' statistics against the population's: {m.batch_effect}",
                *(
                    f"{named(path)}: the population's statistics in this layer alone {_change(removed[path])} {excess}"
                    for path in ranked
                ),
            ],
            loss=gap.loss,
            output=gap.output,
            samples=gap.samples,
            batches=gap.batches,
        )

    def revise(self, finding: Finding, findings: Sequence[Finding]) -> Finding:
        found = {f.code for f in findings if f.severity > Severity.NOTE or f.code in _CAUSES[:2]}
        causes = [code for code in _CAUSES if code in found]
        return replace(finding, repair=f"# fix these causes first: {', '.join(causes)}") if causes else finding


def _change(removed: float) -> str:
    return f"remove {removed:.0%} of" if removed >= 0 else f"add {-removed:.0%} to"


def _in_loss(whole: Effect) -> bool:
    return whole.loss is not None and whole.loss > 0


def _removed(left: Effect, whole: Effect) -> float:
    """Return the share of the whole effect that was removed."""
    if _in_loss(whole):
        assert left.loss is not None and whole.loss is not None
        return 1 - left.loss / whole.loss
    return 1 - left.output / max(whole.output, 1e-30)
