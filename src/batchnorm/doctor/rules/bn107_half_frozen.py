"""BN107: layers of which only half is frozen."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule
from batchnorm.nn.frozen import FrozenLayer


class HalfFrozen(Rule):
    """Parameters by whether they are trained, statistics by the mode that training gives the layer."""

    code = "BN107"
    title = "frozen layers whose statistics move"
    why = (
        "requires_grad=False stops γ and β; running statistics move with every batch in training mode all the same, "
        "and the layer normalizes by the batch. What was meant to be frozen drifts."
    )
    repair = "model, report = batchnorm.freeze(model, only=[{paths}])"

    def check(self, probe: Probe) -> Iterator[Finding]:
        """In a model that is trained at all."""
        if not probe.trains:
            return
        held = None
        if probe.optimizer is not None:
            held = {id(p) for group in probe.optimizer.param_groups for p in group["params"]}

        def trained(layer: Layer) -> bool:
            return any(p.requires_grad and (held is None or id(p) in held) for p in layer.affine)

        affine = [layer for layer in probe.layers if layer.affine]
        drifting = [layer for layer in affine if layer.moves and not trained(layer)]
        if drifting:
            yield self._drifting(probe, drifting)
        fixed = [layer for layer in affine if not layer.by_batch and trained(layer)]
        if fixed:
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in fixed],
                f"{counted(len(fixed), 'layer trains γ and β and keeps its', 'layers train γ and β and keep their')} "
                f"statistics: {listed(layer.path for layer in fixed)}",
                evidence=[
                    "often meant so in fine-tuning; the statistics then go stale as the weights before them move"
                ],
                repair="model, report = batchnorm.recalibrate(model, training_data, only='*')  # after training",
            )

        bare = [layer for layer in probe.layers if not (layer.affine or layer.by_batch or _is_frozen(layer))]
        if bare and any(layer.by_batch for layer in probe.layers):
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in bare],
                f"{counted(len(bare), 'layer')} without γ and β stay in evaluation where others train: "
                f"{listed(layer.path for layer in bare)}",
                evidence=["nothing else tells whether that is meant so; their statistics go stale as the weights move"],
                repair="model, report = batchnorm.recalibrate(model, training_data, only='*')  # after training",
            )

    def _drifting(self, probe: Probe, layers: list[Layer]) -> Finding:
        paths = [layer.path for layer in layers]
        evidence, figures = [], {}
        to_come = [found for found in probe.off if found.layer in layers and found.matters]
        severity, cost = Severity.WARNING, {}
        if probe.off:
            evidence.append(
                f"on these data the statistics of {len(to_come)} of them move by 0.25σ and more"
                if to_come
                else "on these data they hold what they would move to"
            )
            figures = {found.layer.path: found.shift for found in probe.off if found.layer in layers}
        if probe.gap is not None:
            evidence.append(f"normalized by the running statistics against the batch: {probe.gap}")
            cost = dict(probe.gap.cost)
        if not probe.training:
            evidence.append("as model.train() makes it; code that calls .eval() on these layers afterwards is not seen")
        first = ", ".join(repr(path) for path in paths[:8]) + (", ..." if len(paths) > 8 else "")
        return self.finding(
            severity,
            paths,
            f"{counted(len(layers), 'layer has', 'layers have')} γ and β frozen, and statistics that move: "
            f"{listed(paths)}",
            evidence=evidence,
            confidence="certain" if probe.training else "medium",
            cost=cost,
            repair=self.repair.format(paths=first),
            shift=figures,
        )


def _is_frozen(layer: Layer) -> bool:
    return isinstance(layer.module, FrozenLayer)
