from __future__ import annotations

import math

from batchnorm.doctor.rules.rule import Findings, Measurements, Rule, Severity
from batchnorm.doctor.wording import named

# A warning if padding shifts the statistics by more than this, in σ or ln σ.
_MATTERS = 0.25


class Padding(Rule):
    code = "BN113"
    title = "padding enters the statistics"
    why = """
        Sequences of different lengths and images of different sizes are padded to one size. Batch normalization counts
        the padding as values. Mean, variance and every output therefore depend on the amount of padding.
    """
    evidence = """
        - **Sequences**, [N, C, L] or [N, L, C]: positions at the end or at the beginning of the samples that hold one
          constant vector, zero or not. It is the same in all samples, and its lengths differ.
        - **Images**, [N, C, H, W], and volumes: whole rows and columns that hold one constant vector, the same in all
          images. They may be at the bottom and the right, where collate functions for detection and segmentation put
          them, at the other sides, or on both sides of an image in the middle (letterboxes). At least a quarter of the
          images have padding, its sizes differ, and nine in ten edges are sharp: most of the image's outermost line has
          other values.

        There are three more conditions. Nine in ten of the padded samples are padded at the same ends. The padding is
        longer than runs of the constant inside the samples. It is at least 5 % of all positions. The input of each
        layer is measured with and without padding, in one batch: the difference of the means in σ, or of ln σ. Layers
        that are called with a mask are left out.
    """
    severity = "A warning if the statistics move by more than 0.25, otherwise a note."
    repair = """
        model, report = batchnorm.convert(model, batchnorm.nn)
        # in the model's forward: layer(x, mask=mask); mask [N, L], for images [N, H, W], is True where x counts
    """
    notes = """
        Padding that looks like a background is not found: sequences in the middle of their padding, images at random
        places in their padding, images whose background is the constant, padding by reflection or by the last row, and
        padding in batches of one. Padding of the same length in all samples is not found either, because such a
        constant can be data: a start token, the first value of a series of differences, or the border of a scan.
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
            evidence=[f"{_places(m.padding.ends)} that hold the same constant in every channel, of different sizes"],
            confidence="high" if m.samples >= 64 else "medium",
            cost={"padding": m.padding.share},
            layers=shifts,
        )


def _places(ends: tuple[str, ...]) -> str:
    if ends[0] in ("beginning", "end"):
        return f"positions at the {ends[0]} of the sequences"
    *most, last = ends
    return f"areas at the {', the '.join(most)}{' and the ' if most else ''}{last} of the images"
