from __future__ import annotations

from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed


class NeverUpdated(Rule):
    code = "BN201"
    title = "running statistics were never updated"
    why = """
        A layer has mean 0 and variance 1 if it was trained in evaluation mode only, or if its buffers were not in the
        checkpoint. In evaluation, it then does not normalize.
    """
    evidence = """
        A mean of 0 and a variance of 1 in every channel of a layer whose γ and β are not 1 and 0. Two cases are notes:
        a layer with only initial values, and a counter at 0 with other statistics, as in many published weights.
    """
    severity = "Decided by the cost of the running statistics against the population's; without data, a warning."
    repair = "model, report = batchnorm.recalibrate(model, training_data)"
    repair_keras = "model, report = batchnorm.keras.recalibrate(model, training_data)"
    source = "PyTorch's documentation of `BatchNorm2d`."
    causes = ("BN216",)

    def check(self, m: Measurements) -> Findings:
        new = [layer for layer in m.measured if layer.is_new()]
        trained = [layer.path for layer in new if _is_trained(layer)]
        if trained:
            effect = m.running_effect
            yield self.finding(
                Severity.WARNING if effect is None else effect.severity,
                trained,
                f"{counted(len(trained), 'trained layer has', 'trained layers have')} mean 0 and variance 1: "
                f"{listed(trained)}",
                effect=effect,
                evidence=[] if effect is None else [f"running statistics against the population's: {effect}"],
                confidence="medium",
            )
        untrained = [layer.path for layer in new if not _is_trained(layer)]
        if untrained:
            yield self.finding(
                Severity.NOTE,
                untrained,
                f"{counted(len(untrained), 'layer is', 'layers are')} new, with mean 0, variance 1, γ 1 and β 0: "
                f"{listed(untrained)}",
                repair="# load the trained weights with their buffers, or train the model",
            )
        uncounted = [layer.path for layer in m.measured if layer.updates == 0 and not layer.is_new()]
        if uncounted:
            yield self.finding(
                Severity.NOTE,
                uncounted,
                f"{counted(len(uncounted), 'layer has statistics and counts', 'layers have statistics and count')} "
                "no update, as after loading from another framework",
                repair="",
            )


def _is_trained(layer: Layer) -> bool:
    parameters = (layer.vectors.weight, 1), (layer.vectors.bias, 0)
    return any(vector is not None and bool((vector != initial).any()) for vector, initial in parameters)
