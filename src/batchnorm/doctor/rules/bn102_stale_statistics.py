"""BN102: the running statistics belong to other weights, or it cannot be told to what."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding
from batchnorm.doctor.measure.cause import Cause, cause, suspects
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class StaleStatistics(Rule):
    """Also where the cause cannot be told: recalibration repairs both."""

    code = "BN102"
    title = "running statistics do not fit the activations"
    why = (
        "Running statistics follow the activations with a delay. After averaging, pruning or quantizing weights, "
        "after training with the layers in evaluation, or after too few updates, they belong to another network."
    )
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    needs = ("data", "output")

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Where the running statistics are off and the data are not what changed."""
        yield from off_finding(self, probe, ("stale", "unknown"))


def off_finding(rule: Rule, probe: Probe, kinds: tuple[str, ...]) -> Iterator[Finding]:
    """Running statistics that are off for one of these causes."""
    if probe.off_by is None:
        return
    offs = suspects(probe, probe.off_by)
    if not offs:
        return
    why: Cause = cause(probe, offs)
    if why.kind not in kinds:
        return
    by = probe.off_by
    evidence = [f"with the running statistics against the population's: {by}", *why.evidence]
    if why.kind == "unknown":
        evidence.append("unsure: the weights may have changed since, or these are other data than in training (BN103)")
    evidence += [str(found) for found in offs[:5]]
    yield rule.finding(
        by.severity,
        [found.layer.path for found in offs],
        f"{len(offs)} of {counted(len(probe.off), 'layer is', 'layers are')} off: "
        f"{listed([found.layer.path for found in offs], 3)}",
        evidence=evidence,
        confidence=by.confidence,
        cost=by.cost,
        cause=why.kind,
        layers={
            found.layer.path: {"shift": found.shift, "log_scale": found.scale, "divergence": found.divergence}
            for found in offs
        },
    )
