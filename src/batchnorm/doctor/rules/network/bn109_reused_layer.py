from __future__ import annotations

from typing import Any

from batchnorm.doctor.measure.distance import different_calls, distance_of_calls
from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named


class ReusedLayer(Rule):
    code = "BN109"
    title = "a layer is called several times in a forward pass"
    why = """
        In training, each call normalizes by its own batch statistics. In evaluation, all calls share one pair of
        running statistics, a mixture of all of them. If the calls have different inputs, no pair fits.
    """
    evidence = """
        The calls of each layer in one forward pass of the model, with the mean and variance of the input of each call.
        If these differ, one more pass (`budget=`) normalizes every call by its own population, and measures the cost of
        the common statistics. Without data, the calls are counted in the traced model.
    """
    severity = "Decided by that cost; a note if the calls have similar inputs."
    repair = """
        # for a module in several places:
        model, report = batchnorm.recalibrate(model, training_data, shared="separate")
        # for a module called in a loop: one BatchNorm for each step, in an nn.ModuleList
    """
    source = "Cooijmans et al. 2017, *Recurrent Batch Normalization* (statistics for each time step)."

    def check(self, m: Measurements) -> Findings:
        model_calls = 1 if m.step is None else m.step.model_calls
        for layer in m.layers:
            calls = len(layer.calls) or (layer.place.calls if layer.place is not None else len(layer.paths))
            if calls <= max(1, model_calls):
                continue
            effect = m.pooled_calls.get(layer.path)
            figures: dict[str, Any] = {"calls": calls}
            if len(layer.calls) < 2:
                evidence = ["data show whether the calls have different inputs"]
            else:
                shift, scale = distance_of_calls(layer)
                figures |= {"shift": shift, "scale": scale}
                evidence = [
                    f"the means of the calls differ by up to {shift:.2g}σ, their σ by a factor of up to {scale:.2f}"
                ]
                if effect is not None:
                    evidence.append(f"common statistics against statistics for each call: {effect}")
                elif different_calls(layer):
                    evidence.append("the cost was not measured: no pass was left, or no output to compare")
            yield self.finding(
                Severity.NOTE if effect is None else effect.severity,
                layer.paths,
                f"{named(layer.path)} is called {calls} times",
                effect=effect,
                evidence=evidence,
                **figures,
            )
