"""BN215: processes that hold different layers."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Deviations between the processes' running statistics that their last batches do not explain.
_APART = 0.25


class RanksDiffer(Rule):
    """γ, β and running statistics of every process against the first one's."""

    code = "BN215"
    title = "processes hold different parameters or running statistics"
    why = (
        "Each process moves its running statistics by its own batches, and saving or evaluating on one of them takes "
        "that one's. With other parameters they do not even train one network."
    )
    repair = (
        "for tensor in (*model.parameters(), *model.buffers()):  # on every process, before it goes on\n"
        "    torch.distributed.broadcast(tensor.data, src=0)\n"
        "# and from then on, DistributedDataParallel with broadcast_buffers=True, or\n"
        "model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)"
    )
    needs = ("ranks",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Other parameters are certain to be wrong; other statistics by how far they are apart."""
        ranks = probe.ranks
        if ranks is None:  # one process
            return
        if not ranks.alike:
            yield self.finding(
                Severity.ERROR, [], "the processes have other layers, or layers with other numbers of channels"
            )
            return
        apart = {layer.path: ranks.apart(layer.path, layer.eps) for layer in probe.layers}
        other = [path for path, (parameters, _) in apart.items() if parameters > 0]
        if other:
            yield self.finding(
                Severity.ERROR,
                other,
                f"γ or β of {counted(len(other), 'layer')} differ between {len(ranks.held)} processes, by up to "
                f"{max(apart[path][0] for path in other):.2g}: {listed(other)}",
                layers={path: apart[path][0] for path in other},
            )
        moved = sorted((path for path, (_, far) in apart.items() if far > 0), key=lambda path: -apart[path][1])
        if moved:
            far = apart[moved[0]][1]
            yield self.finding(
                Severity.WARNING if far > _APART else Severity.NOTE,
                moved,
                f"running statistics of {counted(len(moved), 'layer')} differ between {len(ranks.held)} processes, "
                f"by up to {far:.2g}σ at {moved[0] or '(model)'}",
                layers={path: apart[path][1] for path in moved},
            )
