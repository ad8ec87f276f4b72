from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed, named

# A warning if running statistics differ by more than this, in σ or ln σ; the last batches do not explain it.
_MATTERS = 0.25


class RanksDiffer(Rule):
    code = "BN215"
    title = "processes hold different parameters or running statistics"
    why = """
        Each process updates its running statistics by its own batches. A process that saves or evaluates the model uses
        its own statistics. With different parameters, the processes do not even train the same network.
    """
    evidence = """
        With `process_group=`, γ, β and running statistics of every process of the group, compared with those of the
        first: the root mean square over the channels of the difference of the means in σ, or of ln σ.
    """
    severity = """
        Different parameters, layers or channels: an error. Different running statistics: a warning from 0.25, otherwise
        a note, because the last batch of each process moves them.
    """
    repair = """
        for tensor in (*model.parameters(), *model.buffers()):  # on every process, before it continues
            torch.distributed.broadcast(tensor.data, src=0)
        # and from then on, DistributedDataParallel with broadcast_buffers=True, or
        model, report = batchnorm.convert(model, batchnorm.SyncBatchNorm)
    """
    source = "PyTorch's documentation of `DistributedDataParallel`, `broadcast_buffers`."
    needs = ("ranks",)

    def check(self, m: Measurements) -> Findings:
        processes = m.process_states
        if processes is None:  # a single process
            return
        if not processes.comparable:
            yield self.finding(
                Severity.ERROR, [], "the processes have different layers, or layers with different numbers of channels"
            )
            return
        number = len(processes.states)
        differences = {layer.path: processes.difference(layer.path, layer.eps) for layer in m.layers}
        parameters = {path: difference for path, (difference, _) in differences.items() if difference > 0}
        if parameters:
            yield self.finding(
                Severity.ERROR,
                parameters,
                f"γ or β of {counted(len(parameters), 'layer')} differ between {number} processes, by up to "
                f"{max(parameters.values()):.2g}: {listed(parameters)}",
                layers=parameters,
            )
        statistics = {path: difference for path, (_, difference) in differences.items() if difference > 0}
        if statistics:
            worst = sorted(statistics, key=lambda path: -statistics[path])
            most = statistics[worst[0]]
            yield self.finding(
                Severity.WARNING if most > _MATTERS else Severity.NOTE,
                worst,
                f"running statistics of {counted(len(worst), 'layer')} differ between {number} processes, by up to "
                f"{most:.2g}σ at {named(worst[0])}",
                layers={path: statistics[path] for path in worst},
            )
