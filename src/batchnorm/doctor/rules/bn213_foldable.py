"""BN213: layers that a model in deployment need not have."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class Foldable(Rule):
    """A model in evaluation of which nothing is trained, by its trace."""

    code = "BN213"
    title = "layers could be folded away for inference"
    why = (
        "In evaluation batch normalization is a scale and a shift for each channel, which a convolution or linear "
        "layer beside it can take over: same results, fewer operations and less memory."
    )
    repair = "folded, report = batchnorm.fold(model, example_inputs)"
    needs = ("trace",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Only for models that nobody trains: in evaluation, without parameters that require a gradient."""
        if probe.training or probe.trains:
            return
        found = [layer.path for layer in probe.layers if layer.place is not None and layer.place.foldable]
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{len(found)} of {counted(len(probe.layers), 'layer')} can be folded: {listed(found)}",
            )
