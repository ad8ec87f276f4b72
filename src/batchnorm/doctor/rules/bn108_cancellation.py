"""BN108: a mean so far above the deviation that digits are lost."""

from __future__ import annotations

from collections.abc import Iterator

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Error of a normalized value, in standard deviations.
_NOTE, _WARNING, _ERROR = 1e-3, 1e-2, 0.1


class Cancellation(Rule):
    """Measured: torch's batch normalization on the layer's own input, against float64."""

    code = "BN108"
    title = "the mean is so large that the digits of the deviation are lost"
    why = (
        "x - mean cancels where |mean| is many deviations: what is left are the last digits of x in its dtype. "
        "float32 has 7 digits, float16 3, bfloat16 2."
    )
    repair = (
        "standardizer = batchnorm.Standardizer().fit(data)  # in float64, before the data become the layer's dtype\n"
        "model, report = batchnorm.accelerate(model)  # its layers lose no more than the input already has"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By the larger of the error of the input and that of the computation."""
        known = [(layer, layer.precision) for layer in probe.measured if layer.precision is not None]
        found = [(layer, precision) for layer, precision in known if precision.error > _NOTE]
        if not found:
            return
        found.sort(key=lambda pair: -pair[1].error)
        layer, precision = found[0]
        error, dtype = precision.error, str(precision.dtype).removeprefix("torch.")
        yield self.finding(
            Severity.ERROR if error > _ERROR else Severity.WARNING if error > _WARNING else Severity.NOTE,
            [layer.path for layer, _ in found],
            f"{layer.path or '(model)'}: |mean| is {precision.ratio:.3g} deviations in channel {precision.channel}, "
            f"and {dtype} leaves normalized values with an error of {error:.1g}σ",
            evidence=[
                f"{layer.path or '(model)'}: {precision.given:.1g}σ by the rounding of its input, "
                f"{precision.computed:.1g}σ by torch's computation on it"
                for layer, precision in found[:5]
            ],
            cost={"error": error},
            layers={layer.path: precision.error for layer, precision in found},
        )
