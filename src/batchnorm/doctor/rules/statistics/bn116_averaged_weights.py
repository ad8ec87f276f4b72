from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule


class AveragedWeights(Rule):
    code = "BN116"
    title = "averaged weights have the running statistics of other weights"
    why = """
        Stochastic weight averaging (SWA) and exponential moving averages (EMA) average parameters. The activations of
        the averaged weights are not the average of the activations. The running statistics, copied or averaged, belong
        to none of these weights, and the averaged network was never run in training to update them.
    """
    evidence = """
        The running statistics do not fit the data, as for [BN102](bn102.md), and the model holds averages: it is a
        `torch.optim.swa_utils.AveragedModel` of several models, or its class is named after averaging. If the averages
        were copied into a plain model, only their effect is seen, and the finding is BN102, which names averaging among
        the possible causes. Averaging makes weights smaller, so a smaller σ in the first layer is not taken for other
        data, unless this layer normalizes the data themselves.
    """
    severity = "Decided by the cost of the running statistics against the population's, on the same batches."
    repair = "model, report = batchnorm.recalibrate(model, training_data)  # after the last update of the averages"
    notes = "`torch.optim.swa_utils.update_bn` does the same with running averages over the data."
    source = "Izmailov et al. 2018, *Averaging Weights Leads to Wider Optima and Better Generalization*, section 3.2."
    needs = ("data", "output")

    def check(self, m: Measurements) -> Findings:
        if m.misfit is not None and m.misfit.cause.kind == "averaged":
            yield self.finding(**m.misfit.finding)
