"""BN114: activations beyond what their half type holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Of the largest number of the type, from which on the next batch may overflow.
_NEAR = 0.25


class HalfOverflow(Rule):
    """The largest value that a layer is given, against the largest of its dtype."""

    code = "BN114"
    title = "activations overflow their half-precision type"
    why = (
        "float16 ends at 65504. Batch normalization takes any scale away again, so that weights before it grow "
        "unnoticed until a value is infinite; then mean and variance are NaN, and the running statistics stay so."
    )
    repair = (
        "model = model.float()\n"
        "with torch.autocast(x.device.type, dtype=torch.bfloat16):  # which ends where float32 does\n"
        "    y = model(x)"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Certain where values are infinite; a note where they are near the end."""
        near = []
        for layer in probe.measured:
            if layer.largest is None or layer.largest.dtype not in (torch.float16, torch.bfloat16):
                continue
            share = float(layer.largest.double()) / torch.finfo(layer.largest.dtype).max
            if not share <= _NEAR:
                near.append((layer, share))
        if not near:
            return
        over = [layer for layer, share in near if not share <= 1]
        layer, _ = max(near, key=lambda pair: pair[1] if pair[1] <= 1 else math.inf)
        assert layer.largest is not None
        kind = str(layer.largest.dtype).removeprefix("torch.")
        yield self.finding(
            Severity.ERROR if over else Severity.NOTE,
            [layer.path for layer in over] or [layer.path for layer, _ in near],
            f"{layer.path or '(model)'}: values that are not finite in {kind}"
            if over
            else f"{layer.path or '(model)'}: values of {share:.0%} of the largest of {kind}",
            evidence=[
                f"{layer.path or '(model)'}: largest |x| {float(layer.largest):.3g}, {kind} ends at "
                f"{torch.finfo(layer.largest.dtype).max:.3g}"
                for layer, _ in near[:5]
                if layer.largest is not None
            ],
            layers={layer.path: share if share <= 1 else None for layer, share in near},
        )
