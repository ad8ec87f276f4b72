"""BN111: dropout whose noise is in the running variance, and not in evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.cause import cause, suspects
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class DropoutBefore(Rule):
    """The same batch with and without what is random in training."""

    code = "BN111"
    title = "dropout before batch normalization shifts its variance"
    why = (
        "Dropout keeps the mean and raises the variance, in training only. Running variances hold the raised one; in "
        "evaluation the layer divides by too much, and so does every layer after it."
    )
    repair = "model, report = batchnorm.recalibrate(model, training_data)  # or dropout behind the last of these layers"
    needs = ("step or trace",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the deviation of the layers' inputs; severe by what the running statistics cost, if that is why."""
        if probe.step is None:
            yield from self._unmeasured(probe)
            return
        found = probe.random_scale
        if not found:
            return
        worst = sorted(found, key=lambda layer: -abs(math.log(found[layer])))
        severity, confidence, cost, evidence = Severity.NOTE, "certain", {}, []
        if probe.off_by is not None:
            evidence.append(f"with the running statistics against the population's: {probe.off_by}")
            offs = suspects(probe, probe.off_by)
            if offs and cause(probe, offs).kind == "dropout":
                severity, confidence, cost = probe.off_by.severity, probe.off_by.confidence, probe.off_by.cost
        yield self.finding(
            severity,
            [layer.path for layer in worst],
            f"in training the input of {counted(len(worst), 'layer')} deviates by up to "
            f"{found[worst[0]]:.2f} times as much: " + listed(layer.path for layer in worst),
            evidence=evidence,
            confidence=confidence,
            cost=cost,
            scale={layer.path: found[layer] for layer in worst},
        )

    def _unmeasured(self, probe: Probe) -> Iterator[Finding]:
        found = {layer: probe.dropped[layer.module] for layer in probe.measured if layer.module in probe.dropped}
        if probe.trains and found:
            paths = [layer.path for layer in found]
            yield self.finding(
                Severity.NOTE,
                paths,
                f"dropout of up to {max(found.values()):.0%} stands before {counted(len(found), 'layer')}: "
                f"{listed(paths)}",
                evidence=["what it does to the variance shows with data and a training step"],
                dropout={layer.path: share for layer, share in found.items()},
            )
