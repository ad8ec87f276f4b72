"""BN109: one layer, and one pair of running statistics, for several places."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Deviations between the calls' means, or |ln| of their deviations' ratio, above which they are different populations.
_DIFFERENT = 0.25


class ReusedLayer(Rule):
    """In training each call has its own statistics; in evaluation all share one pair."""

    code = "BN109"
    title = "a layer is called several times in a forward pass"
    why = (
        "Each call normalizes by its own batch statistics in training, and by one pair of running statistics, a "
        "mixture of all calls, in evaluation. Where the calls are given different things, no pair fits."
    )
    repair = (
        "# for a module in several places:\n"
        'model, report = batchnorm.recalibrate(model, training_data, shared="separate")\n'
        "# for a module called in a loop: one BatchNorm for each step, in an nn.ModuleList"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By how far the calls' populations are apart, and what the common statistics cost."""
        model_calls = 1 if probe.step is None else probe.step.model_calls
        for layer in probe.layers:
            calls = len(layer.calls) or (layer.place.calls if layer.place is not None else len(layer.found.paths))
            if calls <= max(1, model_calls):
                continue
            if len(layer.calls) < 2:
                yield self._unmeasured(layer, calls)
                continue
            shift, scale = _apart(layer)
            evidence = [f"the calls' means are up to {shift:.2g}σ apart, their σ up to a factor of {scale:.2f}"]
            severity, confidence, cost = Severity.NOTE, "certain", {}
            if shift > _DIFFERENT or scale > 1 + _DIFFERENT:
                effect = probe.apart(layer)
                if effect is None:
                    evidence.append("what that costs was not measured: no pass was left, or no output to compare")
                else:
                    severity, confidence, cost = effect.severity, effect.confidence, effect.cost
                    evidence.append(f"common statistics against those of each call: {effect}")
            yield self.finding(
                severity, layer.found.paths, f"{layer.path or '(model)'} is called {calls} times", evidence=evidence,
                confidence=confidence, cost=cost, calls=calls, shift=shift, scale=scale,
            )  # fmt: skip

    def _unmeasured(self, layer: Layer, calls: int) -> Finding:
        return self.finding(
            Severity.NOTE, layer.found.paths, f"{layer.path or '(model)'} is called {calls} times", calls=calls,
            evidence=["whether the calls are given different things shows with data"],
        )  # fmt: skip


def _apart(layer: Layer) -> tuple[float, float]:
    """Root mean square of the largest distance of the means, and median of the largest ratio of deviations."""
    means = torch.stack([moments.mean for moments in layer.calls])
    deviations = torch.stack([(moments.var + layer.eps).sqrt() for moments in layer.calls])
    pooled = deviations.square().mean(0).sqrt()
    shift = ((means.amax(0) - means.amin(0)) / pooled).square().mean().sqrt()
    return float(shift), float((deviations.amax(0) / deviations.amin(0).clamp_min(1e-30)).median())
