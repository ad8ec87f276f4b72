from __future__ import annotations

import math

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, layers_listed, listed


class DropoutBefore(Rule):
    code = "BN111"
    title = "dropout before batch normalization shifts its variance"
    why = """
        Dropout keeps the mean and raises the variance, in training only. The running variance averages the raised
        variance. In evaluation, the layer therefore divides by too much, and so does every layer after it.
    """
    evidence = """
        The first batch goes through a training step, with dropout, and through the network normalized by the batch,
        without dropout. The finding names the layers whose input's standard deviation differs by 10 % or more.

        Without data: the layers that follow a dropout in the trace, with no other batch normalization between, if any
        parameter is trained.
    """
    severity = """
        Decided by the cost of the running statistics against the population's without dropout, if these are most of the
        layers that are off; otherwise a note.
    """
    repair = "model, report = batchnorm.recalibrate(model, training_data)  # or dropout after the last of these layers"
    source = "Li et al. 2019, *Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift*."
    needs = ("step or trace",)

    def check(self, m: Measurements) -> Findings:
        if m.step is None:
            yield from self._from_trace(m)
            return
        found = m.dropout_scale
        if not found:
            return
        worst = sorted(found, key=lambda path: -abs(math.log(found[path])))
        caused = m.misfit is not None and m.misfit.cause.kind == "dropout"
        effect = m.running_effect
        yield self.finding(
            effect.severity if effect is not None and caused else Severity.NOTE,
            worst,
            f"in training the input of {counted(len(worst), 'layer')} deviates by up to {found[worst[0]]:.2f} times as "
            f"much: {listed(worst)}",
            effect=effect if caused else None,
            evidence=[] if effect is None else [f"running statistics against the population's: {effect}"],
            scale={path: found[path] for path in worst},
        )

    def _from_trace(self, m: Measurements) -> Findings:
        found = {layer.path: m.dropout[layer.path] for layer in m.measured if layer.path in m.dropout}
        if m.trains and found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"dropout of up to {max(found.values()):.0%} is before {layers_listed(found)}",
                evidence=["data and a training step show its effect on the variance"],
                dropout=found,
            )
