from __future__ import annotations

from batchnorm.doctor.measure.layers import NOISY
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, named


class NotSynchronized(Rule):
    code = "BN214"
    title = "statistics of a small local batch are not shared between processes"
    why = """
        DistributedDataParallel averages gradients only. Each process normalizes by its own part of the batch. More
        processes with the same total batch size therefore make these parts smaller.
    """
    evidence = """
        The number of processes of `torch.distributed`, or of `process_group=`. The noise is measured as for
        [BN104](bn104.md), at the batch size of this process, without communication with the others. torch's and this
        library's `SyncBatchNorm`, and `BatchRenorm(sync=True)`, are left out.
    """
    severity = "Decided by the cost of the local batches' statistics against the population's; a note without a loss."
    repair = "model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)"
    source = "Peng et al. 2018, *MegDet*; the guide to several processes."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        effect = m.batch_effect
        paths = [layer.path for layer in m.measured if layer.by_batch and not layer.synchronized]
        if m.processes < 2 or effect is None or not paths or m.dependent:
            return
        noise = {path: m.noise[path] for path in paths if path in m.noise}
        worst = max(noise, key=lambda path: noise[path], default=None)
        if worst is None or (noise[worst] < NOISY and effect.severity == Severity.NOTE):
            return
        yield self.finding(
            effect.severity if effect.loss is not None else Severity.NOTE,
            paths,
            f"each of {m.processes} processes normalizes {counted(len(paths), 'layer')} by its own "
            f"{m.batch_size:g} samples: noise of {noise[worst]:.2g}σ at {named(worst)}, "
            f"{noise[worst] / m.processes**0.5:.2g}σ if shared",
            effect=effect,
            evidence=[f"batches' statistics against the population's: {effect}"],
            processes=m.processes,
            batch_size=m.batch_size,
            noise=noise,
        )
