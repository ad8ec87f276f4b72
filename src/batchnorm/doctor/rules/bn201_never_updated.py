"""BN201: running statistics that are still those of a new layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.cause import LAGS, initial
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class NeverUpdated(Rule):
    """A counter at zero alone is a note: many published weights have it, with statistics that are right."""

    code = "BN201"
    title = "running statistics were never updated"
    why = (
        "A layer that only ever trained in evaluation mode, or whose buffers were not in the checkpoint, has mean 0 "
        "and variance 1: in evaluation it does not normalize."
    )
    repair = "model, report = batchnorm.recalibrate(model, training_data)"

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the values first, then by the counters."""
        new = [layer for layer in probe.measured if layer.is_new()]
        trained = [layer for layer in new if _is_trained(layer)]
        if trained:
            by = probe.off_by
            yield self.finding(
                Severity.WARNING if by is None else by.severity,
                [layer.path for layer in trained],
                f"{counted(len(trained), 'trained layer has', 'trained layers have')} mean 0 and variance 1: "
                f"{listed(layer.path for layer in trained)}",
                evidence=[] if by is None else [f"with them against the population's statistics: {by}"],
                confidence="medium" if by is None else by.confidence,
                cost={} if by is None else by.cost,
            )
        untrained = [layer for layer in new if not _is_trained(layer)]
        if untrained:
            paths = [layer.path for layer in untrained]
            yield self.finding(
                Severity.NOTE,
                paths,
                f"{counted(len(paths), 'layer is', 'layers are')} as new: mean 0, variance 1, γ 1, β 0: "
                f"{listed(paths)}",
                repair="# load the trained weights with their buffers, or train the model",
            )
        uncounted = [layer for layer in probe.measured if layer.updates == 0 and not layer.is_new()]
        if uncounted:
            yield self.finding(
                Severity.NOTE,
                [layer.path for layer in uncounted],
                f"{counted(len(uncounted), 'layer has statistics and counts', 'layers have statistics and count')} "
                "no update, as after loading from another framework",
                repair="",
            )
        if "data" in probe.missing:  # with data BN102 says what it does
            early = [
                (layer, left) for layer in probe.measured if not layer.is_new() and (left := initial(layer)) > LAGS
            ]
            if early:
                layer, left = max(early, key=lambda pair: pair[1])
                yield self.finding(
                    Severity.NOTE,
                    [layer.path for layer, _ in early],
                    f"{counted(len(early), 'layer has', 'layers have')} seen too few batches for their momentum: after "
                    f"{layer.updates} of them {layer.path or '(model)'} holds {left:.0%} of its initial values",
                    left={layer.path: left for layer, left in early},
                )


def _is_trained(layer: Layer) -> bool:
    weight, bias = getattr(layer.module, "weight", None), getattr(layer.module, "bias", None)
    moved = isinstance(weight, torch.Tensor) and bool((weight != 1).any())
    return moved or (isinstance(bias, torch.Tensor) and bool((bias != 0).any()))
