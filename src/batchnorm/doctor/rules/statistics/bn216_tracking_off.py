from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed

# The setting that prevents the updates, and the assignment that allows them.
_SWITCHES = {
    "track_running_stats=False": "track_running_stats = True",
    "momentum=0": "momentum = 0.1",
    "update_running_stats=False": "update_running_stats = True",
}


class TrackingOff(Rule):
    code = "BN216"
    title = "training normalizes by the batch and never updates the running statistics"
    why = """
        With track_running_stats=False or momentum=0, a layer with running statistics normalizes by the batch in
        training. Evaluation uses the running statistics, which do not change while the weights before them do. Neither
        setting freezes a layer, because a frozen layer normalizes by its running statistics also in training.
    """
    evidence = """
        Layers that normalize by the batch in training, and whose running statistics training does not update. The
        finding names the setting that prevents it: `track_running_stats=False`, `momentum=0`, or
        `update_running_stats=False` for this library's layers. With data, it gives the cost of the running statistics
        against the population's.
    """
    severity = """
        Decided by the cost of the running statistics against the population's; without data, a warning. A note if no
        parameter is trained, because nothing changes the activations then.
    """
    repair = """
        for found in batchnorm.walk.norm_layers(model):
            found.module.track_running_stats = True
        model, report = batchnorm.recalibrate(model, training_data)
    """
    notes = """
        In the finding, the fix changes the setting that was found. If the layers were meant to be frozen, use `model,
        report = batchnorm.freeze(model)` instead.
    """
    source = "PyTorch's documentation of `BatchNorm2d`; Lightning issue #15062 (fine-tuning callbacks)."

    def check(self, m: Measurements) -> Findings:
        off = [layer for layer in m.measured if layer.by_batch and not layer.updates_running]
        switches = {layer.path: layer.not_updated_by for layer in off}
        if not switches:
            return
        used = sorted(set(switches.values()))
        header, _, recalibrate = self.repair.splitlines()
        effect = m.running_effect
        severity = Severity.WARNING if effect is None else effect.severity
        yield self.finding(
            severity if m.trains else Severity.NOTE,
            switches,
            f"{counted(len(switches), 'layer trains', 'layers train')} by the batch without updates of the running "
            f"statistics: {listed(switches)}",
            effect=effect,
            evidence=[
                f"because of {', '.join(used)}",
                *([] if effect is None else [f"running statistics against the population's: {effect}"]),
            ],
            repair="\n".join([header, *(f"    found.module.{_SWITCHES[switch]}" for switch in used), recalibrate]),
            switches=switches,
        )
