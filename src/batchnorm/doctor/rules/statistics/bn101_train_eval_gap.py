from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from batchnorm.doctor.finding import one_less
from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.rules.rule import Finding, Findings, Rule, Severity
from batchnorm.doctor.wording import figure, named

# Rules that explain the two parts of a gap: wrong running statistics, and the batches' own statistics.
_OF_RUNNING = (
    *("BN202", "BN109", "BN116", "BN201", "BN216", "BN217", "BN204", "BN107", "BN111", "BN115", "BN105"),
    *("BN103", "BN102"),
)
_OF_BATCHES = ("BN109", "BN115", "BN105", "BN112")
# Rules that explain a gap although they are notes themselves; the second ones only if the gap is a note, too.
_NOTES, _NOTES_OF_NOTES = ("BN102", "BN103", "BN116", "BN217"), ("BN111", "BN115")
# Smallest share of the gap that is named with its cause.
_SHARE = 0.1


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

        - running statistics against the population's: the effect of wrong running statistics (BN102, BN103, BN109,
          BN116, BN217);
        - batches' statistics against the population's: the gain or loss from the other samples of the batch (BN105,
          BN112, BN115).

        The two parts of the loss add up to the gap, so the finding says which share of it a cause explains. If the
        parts have opposite signs, no share is given.

        Layers whose running statistics are off are ranked. For each of the worst ones (`budget=`), one more pass uses
        the population's statistics in that layer alone, and measures how much of the excess loss this removes. Passes
        that other rules need come first.
    """
    severity = """
        Decided by the loss in evaluation minus the loss in training: a warning if the loss grows by 10 % and the output
        changes by 10 %, an error from 50 % and 30 %. The lower end of the 95 % interval over the batches counts. The
        severity is one level lower if a learning rate that is still high explains the gap (BN102).
    """
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    repair_keras = "model, report = batchnorm.keras.recalibrate(model, training_data)"
    notes = """
        If a cause was found, it comes first, and its fix closes the gap. The finding then names its code, and has no
        fix of its own.
    """
    source = """
        Ioffe & Szegedy 2015, *Batch Normalization*, section 3.1; Wu & Johnson 2021, *Rethinking “Batch” in BatchNorm*,
        section 4.
    """
    needs = ("data", "output")
    causes = tuple(dict.fromkeys((*_OF_RUNNING, *_OF_BATCHES)))

    def check(self, m: Measurements) -> Findings:
        gap, whole, batches = m.gap, m.running_effect, m.batch_effect
        if gap is None or whole is None or batches is None or not m.gap_matters:
            return
        running_share, batch_share = _shares(gap, whole, batches)
        ranked = sorted(m.left_by_layer, key=lambda path: _rest(m.left_by_layer[path]))
        yield self.finding(
            gap.severity,
            [*ranked, *(path for path in (m.misfit.paths if m.misfit else ()) if path not in m.left_by_layer)],
            _summary(gap),
            effect=gap,
            evidence=[
                f"evaluation against training: {gap}",
                f"running statistics against the population's: {whole}",
                f"batches' statistics against the population's: {batches}",
                *(f"{named(path)}: {_alone(m.left_by_layer[path], whole)}" for path in ranked),
            ],
            loss=gap.loss,
            output=gap.output,
            samples=gap.samples,
            batches=gap.batches,
            shares={"running": running_share, "batches": batch_share},
        )

    def revise(self, finding: Finding, findings: Sequence[Finding]) -> Finding:
        notes = (*_NOTES, *(_NOTES_OF_NOTES if finding.severity == Severity.NOTE else ()))
        found = {f.code for f in findings if f.severity > Severity.NOTE or f.code in notes}
        explained: dict[str, float] = {}
        for of, share in zip((_OF_RUNNING, _OF_BATCHES), finding.figures["shares"].values(), strict=True):
            cause = next((code for code in of if code in found), None)
            if cause is not None and share >= _SHARE:
                explained[cause] = explained.get(cause, 0.0) + share
        if not explained:
            return finding
        severity = finding.severity
        if "BN102" in explained and any(f.code == "BN102" and f.figures["cause"] == "lag" for f in findings):
            severity = one_less(severity)
        text = " and ".join(_explained(code, share) for code, share in explained.items())
        summary = f"{finding.summary}: explained {text}"
        return replace(finding, severity=severity, causes=tuple(explained), summary=summary, repair="")


def _summary(gap: Effect) -> str:
    if gap.loss is None or gap.base is None:
        changes = "" if gap.disagreement is None else f", and {gap.disagreement:.1%} of the predictions change"
        return f"from training to evaluation, the output changes by {gap.output:.2g} standard deviations{changes}"
    return f"evaluation loss {figure(gap.base + gap.loss)}, training {figure(gap.base)}"


def _shares(gap: Effect, running: Effect, batches: Effect) -> tuple[float, float]:
    """Return the shares of the gap that the running statistics and the batches' statistics explain.

    Without a loss, nothing adds up to the gap. The running statistics then cause it (`gap_matters`).
    """
    if gap.loss is None or running.loss is None or batches.loss is None:
        return math.inf, math.inf
    return running.loss / gap.loss, -batches.loss / gap.loss


def _explained(code: str, share: float) -> str:
    """Return text such as `to 98% by BN217`; a number above 1 is no share."""
    return f"to {share:.0%} by {code}" if share <= 1 else f"by {code}"


def _rest(left: Effect) -> float:
    return left.output if left.loss is None else left.loss


def _alone(left: Effect, whole: Effect) -> str:
    """Return what the population's statistics do in one layer alone."""
    alone = "the population's statistics in this layer alone"
    if whole.loss is None or whole.base is None or left.loss is None:
        return f"{alone} leave a change of {left.output:.2g} standard deviations"
    removed = 1 - left.loss / whole.loss if whole.loss > 0 else -1.0
    share = f", {removed:.0%} of the excess" if 0 <= removed <= 1 else ""
    verb = "lower" if left.loss <= whole.loss else "raise"
    return f"{alone} {verb} the loss from {figure(whole.base + whole.loss)} to {figure(whole.base + left.loss)}{share}"
