"""BN214: processes that each normalize by a small batch of their own."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.bn104_small_batch import NOISY
from batchnorm.doctor.rules.bn105_non_iid_batches import dependent
from batchnorm.doctor.rules.rule import Rule


class NotSynchronized(Rule):
    """BN104's measure at the batch of one process, where there are several."""

    code = "BN214"
    title = "statistics of a small local batch are not shared between processes"
    why = (
        "DistributedDataParallel averages gradients, and nothing else: each process normalizes by its own part of the "
        "batch, so that more processes at the same total make every batch smaller."
    )
    repair = "model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)"
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the measured effect of the local batches' statistics."""
        effect, processes = probe.batch_effect, probe.processes
        layers = [layer for layer in probe.measured if layer.by_batch and not _shares(layer.module)]
        if processes < 2 or effect is None or not layers or dependent(probe):
            return
        size = probe.batch_size
        noise = {layer.path: value for layer, value in probe.noise.items() if layer in layers}
        worst = max(noise, key=lambda path: noise[path], default=None)
        if worst is None or (noise[worst] < NOISY and effect.severity == Severity.NOTE):
            return
        yield self.finding(
            effect.severity if effect.loss is not None else Severity.NOTE,
            [layer.path for layer in layers],
            f"each of {processes} processes normalizes {counted(len(layers), 'layer')} by its own {size:g} samples: "
            f"noise of {noise[worst]:.2g}σ at {worst or '(model)'}, {noise[worst] / processes**0.5:.2g}σ if shared",
            evidence=[f"by the batches' statistics against the population's: {effect}"],
            confidence=effect.confidence,
            cost=effect.cost,
            processes=processes,
            batch_size=size,
            noise=noise,
        )


def _shares(module: nn.Module) -> bool:
    return isinstance(module, nn.SyncBatchNorm) or bool(getattr(module, "sync", False))
