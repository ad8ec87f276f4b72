from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import counted, listed


class Foldable(Rule):
    code = "BN213"
    title = "layers can be folded for inference"
    why = """
        In evaluation batch normalization is a scale and a shift of each channel, which the convolution or linear layer
        next to it can absorb. The results stay the same, with fewer operations and less memory.
    """
    evidence = """
        The layers that a neighbor in the trace can absorb, in a model in evaluation mode without a parameter that
        requires a gradient.
    """
    severity = "A note: the network is correct as it is."
    repair = "folded, report = batchnorm.fold(model, example_inputs)"
    source = "The tutorial, “Fusing into a convolution”."
    needs = ("trace",)

    def check(self, m: Measurements) -> Findings:
        if m.training or m.trains:
            return
        found = [layer.path for layer in m.layers if layer.place is not None and layer.place.foldable]
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{len(found)} of {counted(len(m.layers), 'layer')} can be folded: {listed(found)}",
                repair=f"folded, report = batchnorm.fold(model, {m.example})",
            )
