from __future__ import annotations

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named

# Share of the type's largest number. Above it, the next batch may overflow.
_NEAR = 0.25


class HalfOverflow(Rule):
    code = "BN114"
    title = "activations overflow their half-precision type"
    why = """
        The largest float16 number is 65504. Batch normalization removes any scale, so the weights before it grow
        unnoticed until a value is infinite. Then mean and variance are NaN, and the running statistics stay NaN.
    """
    evidence = """
        The largest |x| in the input of each layer in evaluation, if it is float16 or bfloat16, compared with the
        largest number of that type.
    """
    severity = "An error if values are infinite or NaN; a note from a quarter of the largest number."
    repair = """
        model = model.float()
        with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16):
            pass  # training and evaluation: bfloat16 has the range of float32
    """
    source = "Micikevicius et al. 2018, *Mixed Precision Training*; IEEE 754."
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        near = [  # NaN counts
            (layer.path, half, share)
            for layer in m.measured
            if (half := layer.half_input) is not None and not (share := half.largest / half.limit) <= _NEAR
        ]
        if not near:
            return
        over = [entry for entry in near if not entry[2] <= 1]
        path, half, share = over[0] if over else max(near, key=lambda entry: entry[2])
        yield self.finding(
            Severity.ERROR if over else Severity.NOTE,
            [path for path, *_ in over or near],
            f"{named(path)}: values that are not finite in {half.dtype}"
            if over
            else f"{named(path)}: values of {share:.0%} of the largest of {half.dtype}",
            evidence=[
                f"{named(path)}: largest |x| {half.largest:.3g}, {half.dtype} ends at {half.limit:.3g}"
                for path, half, _ in near[:5]
            ],
            layers={path: share if share <= 1 else None for path, _, share in near},
        )
