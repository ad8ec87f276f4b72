from __future__ import annotations

import math

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named

# Shift of the statistics, in σ or ln σ, from which padding is a warning.
_MATTERS = 0.25


class Padding(Rule):
    code = "BN113"
    title = "padding enters the statistics"
    why = """
        Sequences of several lengths, and images of several sizes, are padded to one size. Batch normalization counts
        the padding as values, so mean and variance, and with them every output, depend on how much padding there is.
    """
    evidence = """
        - **Sequences**, [N, C, L] or [N, L, C]: positions at the end of the samples that hold one constant vector, the
          same in all samples and of several lengths.
        - **Images**, [N, C, H, W], as collate functions of detection and segmentation make them: whole rows at the
          bottom and whole columns at the right that hold one constant vector, the same in all images. At least a
          quarter of the images have some, of different sizes. Nine in ten of these images have none at the top and the
          left, and nine in ten edges are sharp: most of the image's last line has other values.

        The padding has to be at least 5 % of all positions. The input of each layer is measured with and without it, in
        one batch: the difference of the means in σ, or of ln σ. Layers that are called with a mask are left out.
    """
    severity = "A warning where the statistics move by more than 0.25, a note below."
    repair = """
        model, report = batchnorm.convert(model, batchnorm.nn)
        y = layer(x, mask=mask)  # in its forward: which positions count, a boolean [N, L], for images [N, H, W]
    """
    notes = """
        Padding that cannot be distinguished from a background is not found: images in the middle of their padding
        (letterboxes) or shifted about in it, images whose own background is the constant, padding by reflection or by
        the last row, volumes, and batches of one.
    """
    source = """
        The guide to masks; PyTorch issue #70529; Carion et al. 2020, *End-to-End Object Detection with Transformers*,
        whose `NestedTensor` is padded this way and carries the mask.
    """
    needs = ("data",)

    def check(self, m: Measurements) -> Findings:
        if m.padding is None or not m.padding.shifts:
            return
        shifts = m.padding.shifts
        worst = max(shifts, key=lambda path: shifts[path] if math.isfinite(shifts[path]) else -1.0)
        yield self.finding(
            Severity.WARNING if shifts[worst] > _MATTERS else Severity.NOTE,
            [layer.path for layer in m.layers if layer.path in shifts],
            f"{m.padding.share:.0%} of the positions are padding, which moves the statistics of {named(worst)} by "
            f"{shifts[worst]:.2g}σ",
            evidence=[
                "areas at the bottom and the right of the images that hold the same constant in every channel, of "
                "different sizes, and none at the top and the left"
                if m.padding.images
                else "positions at the end of the sequences that hold the same constant in every channel, of different "
                "lengths"
            ],
            confidence="high" if m.samples >= 64 else "medium",
            cost={"padding": m.padding.share},
            layers=shifts,
        )
