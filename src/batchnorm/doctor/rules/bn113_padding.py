"""BN113: positions of padding that are counted as values."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.padding import padded
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule
from batchnorm.moments import Moments

# Deviations of the mean, or |ln| of the deviations' ratio, from which on the statistics are those of the padding too.
_MATTERS = 0.25


class Padding(Rule):
    """Each layer's input with and without the positions that are padding."""

    code = "BN113"
    title = "padding enters the statistics"
    why = (
        "Sequences of several lengths, and images of several sizes, are filled up to one. Batch normalization counts "
        "the filling as values, so that mean and variance, and with them every output, depend on how much of it there "
        "is."
    )
    repair = (
        "model, report = batchnorm.convert(model, batchnorm.nn)\n"
        "y = layer(x, mask=mask)  # in its forward: which positions count, a boolean [N, L], of images [N, H, W]"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """On one batch that has padding."""
        assert probe.data is not None
        found = padded(probe.data.batches)
        if found is None:
            return
        off: dict[Layer, float] = {}

        def see(layer: Layer, x: Tensor) -> None:
            mask = found.kept(x)
            if mask is None or not layer.by_batch:
                return
            every, real = Moments.of(x), Moments.of(x, mask=mask)
            if real.count > 1:
                shift = (every.mean - real.mean) / (real.var + layer.eps).sqrt()
                scale = ((every.var + layer.eps) / (real.var + layer.eps)).log() / 2
                off[layer] = max(float(shift.square().mean().sqrt()), float(scale.square().mean().sqrt()))

        probe.inputs(found.batch, see)
        if not off:
            return
        worst = max(off, key=lambda layer: off[layer] if math.isfinite(off[layer]) else -1.0)
        images = found.positions.dim() == 3
        yield self.finding(
            Severity.WARNING if off[worst] > _MATTERS else Severity.NOTE,
            sorted((layer.path for layer in off), key=[layer.path for layer in probe.layers].index),
            f"{found.share:.0%} of the positions are padding, and move the statistics of {worst.path or '(model)'} by "
            f"{off[worst]:.2g}σ",
            evidence=[
                "areas at the bottom and the right of the images that hold the same constant in every channel, of "
                "sizes that differ from image to image, and none at the top and the left"
                if images
                else "positions at the end of the sequences that hold the same constant in every channel, as many as "
                "differ from sample to sample"
            ],
            confidence="high" if probe.data.samples >= 64 else "medium",
            cost={"padding": found.share},
            layers={layer.path: value for layer, value in off.items()},
        )
