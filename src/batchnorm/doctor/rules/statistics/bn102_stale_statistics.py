from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchnorm.doctor.rules.rule import Finding, Findings, Measurements, Rule
from batchnorm.doctor.wording import counted, listed


class StaleStatistics(Rule):
    code = "BN102"
    title = "running statistics do not fit the activations"
    why = """
        Running statistics follow the activations with a delay. They belong to another network if weights were averaged,
        pruned or quantized, if the layers were in evaluation mode during training, if there were too few updates, or if
        the learning rate was still high in the last steps.
    """
    evidence = """
        The distance of each layer's running mean and variance from the mean and variance of all its inputs: in standard
        deviations, as a ratio, and as the Kullback-Leibler divergence of normal distributions. The part that the sample
        size and the running average's own scatter explain is subtracted. For channels that are constant in the data,
        the unit is the running standard deviation.

        Stale statistics and other data (BN103) look the same in these figures. The weights distinguish the two. The
        mean of a convolution's output is S·m for any data; S are the sums of its weights over the kernel, and m are the
        means of its input channels. A change of the data moves the mean within the range of S; a change of the weights
        does not. The share outside that range is measured for the first layer that is off, in the order of the calls,
        if it has at least twice as many outputs as inputs. Another sign of stale statistics is a first layer that fits
        while later ones do not. If no sign decides, the finding is BN102 and says that it is unsure. Recalibration
        fixes both.

        If no layer is off by more than 0.25 standard deviations or a factor of 1.22, the usual cause is a learning rate
        that is still high in the last steps: the weights change faster than the running average follows. A lower rate
        at the end of training removes the distance, and so does recalibration. Averaged weights can also cause it. Just
        after a jump of the learning rate, the distance is larger. Therefore, if the optimizer is given (`optimizer=`),
        the diagnosis puts statistics that fit into a copy of the model, and trains the copy for 1/momentum steps, at
        most 20. If its running statistics then do as much harm, the learning rate explains the distance.

        Known causes have rules of their own: [BN116](bn116.md) (averaged weights), [BN217](bn217.md) (too few updates
        for the momentum) and [BN111](bn111.md) (dropout).
    """
    severity = """
        Decided by the cost of the running statistics against the population's, on the same batches; one level lower if
        a high learning rate explains the distance.
    """
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    repair_keras = "model, report = batchnorm.keras.recalibrate(model, training_data)"
    source = """
        Wu & Johnson 2021, section 3; Izmailov et al. 2018, *Averaging Weights Leads to Wider Optima* (statistics after
        averaging).
    """
    needs = ("data", "output")
    causes = ("BN109", "BN201", "BN216", "BN208", "BN204", "BN107", "BN115", "BN105")

    def check(self, m: Measurements) -> Findings:
        if m.misfit is not None and m.misfit.cause.kind in ("stale", "lag", "unknown"):
            yield self.finding(**m.misfit.finding)

    def revise(self, finding: Finding, findings: Sequence[Finding]) -> Finding:
        revised = super().revise(finding, findings)
        if not revised.causes:
            return revised
        off = counted(len(finding.paths), "layer is", "layers are")
        evidence = tuple(line for line in revised.evidence if line not in finding.figures["signs"])
        return replace(revised, summary=f"{off} off: {listed(finding.paths, 3)}", evidence=evidence)
