from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule


class StaleStatistics(Rule):
    code = "BN102"
    title = "running statistics do not fit the activations"
    why = """
        Running statistics follow the activations with a delay. After averaging, pruning or quantizing weights, after
        training with the layers in evaluation, or after too few updates, they belong to another network.
    """
    evidence = """
        How far the running mean and variance of each layer are from the mean and variance of all its inputs: in
        standard deviations, as a ratio, and as the Kullback-Leibler divergence of normal distributions. The part that
        the sample's size and the running average's own scatter explain is subtracted. Channels that are constant in the
        data are measured in their running deviation.

        Stale statistics and other data (BN103) look the same in these figures. The weights distinguish the two: the
        mean of a convolution's output is S·m, with S the sums of its weights over the kernel, whatever the data are. A
        change of the data moves it within the range of S; a change of the weights does not. The share outside that
        range is measured for the first layer that is off, in the order of the calls, if it has at least twice as many
        outputs as inputs. Two other signs of stale statistics are initial values that are still in the average (`(1 -
        momentum)^updates`), and a first layer that fits while later ones do not. If no sign decides, the finding is
        BN102 and says that it is unsure; recalibration fixes both.
    """
    severity = "The cost of the running statistics against the population's, on the same batches, decides."
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    source = """
        Wu & Johnson 2021, section 3; Izmailov et al. 2018, *Averaging Weights Leads to Wider Optima* (statistics after
        averaging).
    """
    needs = ("data", "output")

    def check(self, m: Measurements) -> Findings:
        if m.misfit is not None and m.misfit.cause.kind in ("stale", "unknown"):
            yield self.finding(**m.misfit.finding)
