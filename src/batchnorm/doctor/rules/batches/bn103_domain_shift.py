from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule


class DomainShift(Rule):
    code = "BN103"
    title = "the data differ from the data behind the running statistics"
    why = """
        Evaluation normalizes by the statistics of the training data. Other data, or data that are prepared in another
        way (0 to 255 instead of 0 to 1, another mean, another order of colors), give shifted and scaled activations.
    """
    evidence = """
        The figures of [BN102](bn102.md). The finding is BN103 in one of three cases: a change of the layers' inputs can
        cause the deviations of the running means; σ is off by the same factor in all channels of the first layer; the
        first layer normalizes the data themselves.
    """
    severity = "Decided by the cost of the running statistics against the statistics of these data."
    repair = """
        # first compare how training and evaluation prepare the data; if they are meant to differ:
        model, report = batchnorm.recalibrate(model, data)  # the new data; with few samples, add prior=16
    """
    repair_keras = """
        # first compare how training and evaluation prepare the data; if they are meant to differ:
        model, report = batchnorm.keras.recalibrate(model, data)  # the new data; with few samples, add prior=16
    """
    source = """
        Li et al. 2016, *Revisiting Batch Normalization for Practical Domain Adaptation*; Schneider et al. 2020,
        *Improving robustness against common corruptions by covariate shift adaptation*.
    """
    needs = ("data", "output")
    causes = ("BN107", "BN115", "BN105")

    def check(self, m: Measurements) -> Findings:
        if m.misfit is not None and m.misfit.cause.kind == "shift":
            yield self.finding(**m.misfit.finding)
