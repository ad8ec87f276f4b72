from __future__ import annotations

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Finding, Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, patterns

_AFTER_TRAINING = "model, report = batchnorm.recalibrate(model, training_data, only='*')  # after training"


class HalfFrozen(Rule):
    code = "BN107"
    title = "frozen layers still update their running statistics"
    why = """
        requires_grad=False stops γ and β. In training mode the running statistics still follow every batch, and the
        layer normalizes by the batch. A layer that was meant to be frozen drifts. In Keras, trainable=False of the
        variables gamma and beta has the same effect; trainable=False of the layer also freezes its statistics.
    """
    evidence = """
        For each layer, whether γ or β is trained (`requires_grad`, and a place in the optimizer if one is given), and
        whether training updates its statistics. A model in training mode is examined as it is. For a model in
        evaluation mode, `train()` is called and undone, so models that override it to keep layers frozen are
        understood. Code that calls `.eval()` on layers afterwards is not seen, so the confidence is then medium. With
        data, the finding says how far the statistics would move.
    """
    severity = """
        A warning. The reverse is a note, because it is common in fine-tuning: statistics stay fixed while γ and β are
        trained. Layers without γ and β that stay in evaluation while others train are also a note.
    """
    repair = 'model, report = batchnorm.freeze(model, only=["backbone.*"])'
    repair_keras = """
        model, report = batchnorm.keras.freeze(model)  # sets trainable=False of each layer
    """
    source = "PyTorch's documentation of `BatchNorm2d`; Wu & Johnson 2021 (frozen batch normalization)."

    def check(self, m: Measurements) -> Findings:
        if not m.trains:
            return
        drifting = [layer for layer in m.layers if layer.affine and layer.updates_running and not layer.trained]
        if drifting:
            yield self._drifting(m, drifting)
        fixed = [layer.path for layer in m.layers if layer.affine and not layer.by_batch and layer.trained]
        if fixed:
            yield self.finding(
                Severity.NOTE,
                fixed,
                f"{counted(len(fixed), 'layer trains γ and β and keeps its', 'layers train γ and β and keep their')} "
                f"statistics: {listed(fixed)}",
                evidence=[
                    "often intended in fine-tuning; the statistics become stale as the weights before them change"
                ],
                repair=_AFTER_TRAINING,
            )
        bare = [layer.path for layer in m.layers if not (layer.affine or layer.by_batch or layer.frozen)]
        if bare and any(layer.by_batch for layer in m.layers):
            yield self.finding(
                Severity.NOTE,
                bare,
                f"{counted(len(bare), 'layer')} without γ and β stay in evaluation while others train: {listed(bare)}",
                evidence=["this may be intended; their statistics become stale as the weights change"],
                repair=_AFTER_TRAINING,
            )

    def _drifting(self, m: Measurements, layers: list[Layer]) -> Finding:
        paths = [layer.path for layer in layers]
        distances = [distance for distance in m.distances if distance.layer in layers]
        evidence = []
        if m.distances:
            far = sum(distance.matters for distance in distances)
            evidence.append(
                f"on these data the statistics of {far} of them move by 0.25σ or more"
                if far
                else "they have already drifted to these data"
            )
        if m.gap is not None:
            evidence.append(f"running statistics against the batch's: {m.gap}")
        if not m.training:
            evidence.append("as model.train() makes it; code that calls .eval() on these layers afterwards is not seen")
        others = {path for layer in m.layers if layer not in layers for path in layer.paths}
        return self.finding(
            Severity.WARNING,
            paths,
            f"{counted(len(layers), 'layer has', 'layers have')} γ and β frozen, and running statistics that are "
            f"updated: {listed(paths)}",
            evidence=evidence,
            confidence="certain" if m.training else "medium",
            cost={} if m.gap is None else m.gap.cost,
            repair=f"model, report = batchnorm.freeze(model, only={patterns(paths, others)})",
            shift={distance.layer.path: distance.shift for distance in distances},
        )
