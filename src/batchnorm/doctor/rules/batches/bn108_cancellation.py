from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named

# Errors of a normalized value, in standard deviations, from which there is a finding of each severity.
_NOTE, _WARNING, _ERROR = 1e-3, 1e-2, 0.1


class Cancellation(Rule):
    code = "BN108"
    title = "a large mean leaves few digits for the deviation"
    why = """
        x - mean cancels if |mean| is many standard deviations: only the last digits of x remain. float32 has 7 digits,
        float16 has 3, bfloat16 has 2.
    """
    evidence = """
        The ratio |mean|/√(variance + ε) of every channel of the layer's input, from the first batch. If it is large,
        torch's batch normalization runs on that input and is compared with float64, which gives the error of the
        computation. The error that the rounding of the input causes follows from its unit in the last place.
    """
    severity = """
        Decided by the larger of the two errors of a normalized value, in standard deviations: a note from 0.001, a
        warning from 0.01, an error from 0.1.
    """
    repair = """
        # before the data are converted to the layer's dtype: standardizer = batchnorm.Standardizer().fit(data)
        model, report = batchnorm.accelerate(model)  # its layers lose no more than the input has already lost
    """
    source = "The mathematics page, “A large mean”; Chan, Golub & LeVeque 1979."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        known = [(layer.path, layer.precision) for layer in m.measured if layer.precision is not None]
        found = sorted((pair for pair in known if pair[1].error > _NOTE), key=lambda pair: -pair[1].error)
        if not found:
            return
        path, worst = found[0]
        error, dtype = worst.error, worst.dtype
        yield self.finding(
            Severity.ERROR if error > _ERROR else Severity.WARNING if error > _WARNING else Severity.NOTE,
            [path for path, _ in found],
            f"{named(path)}: |mean| is {worst.ratio:.3g} standard deviations in channel {worst.channel}, and {dtype} "
            f"leaves normalized values with an error of {error:.1g}σ",
            evidence=[
                f"{named(path)}: {precision.input_error:.1g}σ from the rounding of its input, "
                f"{precision.computed_error:.1g}σ from torch's computation"
                for path, precision in found[:5]
            ],
            cost={"error": error},
            layers={path: precision.error for path, precision in found},
        )
