from __future__ import annotations

from dataclasses import replace

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, layers_listed, listed


class BatchInEvaluation(Rule):
    code = "BN208"
    title = "evaluation normalizes by the batch"
    why = """
        The result for a sample then depends on the other samples of its batch, also in evaluation. A single sample, or
        a batch of one class, loses its information. In training mode, evaluation also updates the running statistics.
    """
    evidence = """
        - Layers that the evaluation runs in training mode. `diagnose(evaluate=...)` runs your evaluation once, after
          `model.train()`, and records their mode. `watch` counts the updates of the running statistics between training
          steps.
        - Layers that are in training mode after `model.eval()`, because the model overrides `train()`.
        - Layers without running statistics (`track_running_stats=False`).
    """
    severity = """
        In training mode: decided by the cost of the batches' statistics against the running ones, and at least a
        warning. Without running statistics: a note, because it may be intended; the layer cannot be folded.
    """
    repair = "model.eval()  # before every evaluation, and model.train() after it"
    notes = """
        For layers without running statistics, the finding has a fix that adds them. If the model overrides `train()`,
        that method must set these layers to `mode`.
    """
    source = "PyTorch's documentation of `Module.eval` and of `BatchNorm2d`."

    def check(self, m: Measurements) -> Findings:
        if m.evaluated_in_training:
            summary = (
                "the evaluation runs in training mode, without model.eval(): it normalizes by the batch and updates "
                "the running statistics"
            )
            yield from self._in_training(m, m.evaluated_in_training, summary, self.repair)
        elif m.left_in_training:
            summary = (
                "model.eval() leaves layers in training mode: they normalize by the batch and update the running "
                "statistics"
            )
            yield from self._in_training(m, m.left_in_training, summary, _REPAIR_OF_TRAIN)
        found = [layer.path for layer in m.layers if not layer.keeps_statistics]
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{counted(len(found), 'layer keeps', 'layers keep')} no running statistics: {listed(found)}",
                repair=_REPAIR_OF_STATISTICS,
            )

    def _in_training(self, m: Measurements, paths: tuple[str, ...], summary: str, repair: str) -> Findings:
        effect = m.training_mode_effect
        found = self.finding(
            Severity.WARNING if effect is None else max(Severity.WARNING, effect.severity),
            paths,
            summary,
            effect=effect,
            evidence=[
                layers_listed(paths),
                *([] if effect is None else [f"batches' statistics against the running ones: {effect}"]),
            ],
            repair=repair,
        )
        yield replace(found, confidence="certain")  # the mode was observed; only its cost is measured


_REPAIR_OF_TRAIN = """\
for found in batchnorm.walk.norm_layers(model):  # in the model's train(mode), for mode=False
    found.module.eval()"""
_REPAIR_OF_STATISTICS = """\
for found in batchnorm.walk.norm_layers(model):
    layer = found.module
    if layer.running_mean is None:
        layer.track_running_stats = True
        layer.running_mean = torch.zeros(layer.num_features)
        layer.running_var = torch.ones(layer.num_features)
        layer.num_batches_tracked = torch.tensor(0)
model, report = batchnorm.recalibrate(model, training_data)"""
