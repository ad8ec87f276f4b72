"""BN207: running statistics in half precision, which cannot be averaged there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule
from batchnorm.models.observe import running_buffer

# Deviation between running mean and mean, in standard deviations, at which updates stop, that is more than a note.
_MATTERS = 0.05


class HalfPrecision(Rule):
    """An update smaller than half a unit in the last place of the average does nothing."""

    code = "BN207"
    title = "running statistics are kept in half precision"
    why = (
        "running ← running + momentum·(batch - running) stops where the step is smaller than the last digit: with "
        "bfloat16 and momentum 0.1 as soon as the two differ by less than 2%. float16 overflows at variances above "
        "65504."
    )
    repair = (
        "for found in batchnorm.walk.norm_layers(model):  # half inputs and float32 parameters go together\n"
        "    found.module.float()"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Of layers whose statistics move."""
        found = {layer.path: stall for layer in probe.measured if layer.moves and (stall := _stall(layer)) is not None}
        if not found:
            return
        worst = max(found, key=lambda path: found[path])
        yield self.finding(
            Severity.WARNING if found[worst] > _MATTERS and probe.trains and probe.training else Severity.NOTE,
            found,
            f"{counted(len(found), 'layer')}: {listed(found)}",
            evidence=[f"{worst or '(model)'}: updates stop {found[worst]:.2g}σ away from the mean"],
            stall=found,
        )


def _stall(layer: Layer) -> float | None:
    """How far from the mean the running mean stays, in standard deviations; None for single precision and more."""
    dtype = running_buffer(layer.module, "running_mean").dtype
    if dtype not in (torch.float16, torch.bfloat16) or layer.before is None:
        return None
    momentum = getattr(layer.module, "momentum", None) or 0.1
    deviation = (layer.before.var + layer.eps).clamp_min(1e-30).sqrt()
    return float((layer.before.mean.abs() / deviation).max()) * torch.finfo(dtype).eps / 2 / float(momentum)
