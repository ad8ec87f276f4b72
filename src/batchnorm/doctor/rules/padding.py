"""BN113: positions of padding that are counted as values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.layers import Layer
from batchnorm.doctor.probe import Probe
from batchnorm.doctor.rules.rule import Rule
from batchnorm.moments import Moments
from batchnorm.recalibrate.batches import moved, samples_in

# Share of the positions that is worth a look.
_SHARE = 0.05
# Deviations of the mean, or |ln| of the deviations' ratio, from which on the statistics are those of the padding too.
_MATTERS = 0.25


class Padding(Rule):
    """Each layer's input with and without the positions at the end of the sequences that hold one constant."""

    code = "BN113"
    title = "padding enters the statistics"
    why = (
        "Sequences of several lengths are filled up to one. Batch normalization counts the filling as values, so that "
        "mean and variance, and with them every output, depend on how much of it there is."
    )
    repair = (
        "model, report = batchnorm.convert(model, batchnorm.nn)\n"
        "y = layer(x, mask=mask)  # in its forward: which positions count, a boolean [N, L]"
    )
    needs = ("data",)

    def check(self, probe: Probe) -> Iterator[Finding]:
        """On the first batch that has padding."""
        assert probe.data is not None
        found = next(((given, pad) for given in probe.data.batches if (pad := padding_of(given)) is not None), None)
        if found is None:
            return
        batch, pad = found
        off: dict[Layer, float] = {}

        def see(layer: Layer, x: Tensor) -> None:
            mask = _positions(pad, x)
            if mask is None or not layer.by_batch:
                return
            every, real = Moments.of(x), Moments.of(x, mask=mask)
            if real.count > 1:
                shift = (every.mean - real.mean) / (real.var + layer.eps).sqrt()
                scale = ((every.var + layer.eps) / (real.var + layer.eps)).log() / 2
                off[layer] = max(float(shift.square().mean().sqrt()), float(scale.square().mean().sqrt()))

        probe.inputs(batch, see)
        if not off:
            return
        worst = max(off, key=lambda layer: off[layer] if math.isfinite(off[layer]) else -1.0)
        share = float(pad.double().mean())
        yield self.finding(
            Severity.WARNING if off[worst] > _MATTERS else Severity.NOTE,
            sorted((layer.path for layer in off), key=[layer.path for layer in probe.layers].index),
            f"{share:.0%} of the positions are padding, and move the statistics of {worst.path or '(model)'} by "
            f"{off[worst]:.2g}σ",
            evidence=[
                "positions at the end of the sequences that hold the same constant in every channel, as many as differ "
                "from sample to sample"
            ],
            confidence="high" if probe.data.samples >= 64 else "medium",
            cost={"padding": share},
            layers={layer.path: value for layer, value in off.items()},
        )


def padding_of(batch: object) -> Tensor | None:
    """Which positions `[N, L]` of the batch's sequences look like padding; None where hardly any do.

    They are a run at the end that holds one constant vector, the same in all samples, and is of several lengths.
    """
    size = samples_in(batch)
    leaves = [leaf for leaf in pytree.tree_leaves(moved(batch, None)) if isinstance(leaf, Tensor)]
    for x in leaves:
        if x.dim() != 3 or len(x) != size or size < 2 or not x.is_floating_point():
            continue
        for time in (2, 1):  # [N, C, L] as convolutions take it, [N, L, C] as recurrent networks do
            values = x.movedim(time, 1)
            if values.shape[1] < 4:
                continue
            same = (values == values[:, -1:]).all(2)
            run = same.flip(1).long().cumprod(1).sum(1)
            padded = run > 1
            ends = values[padded, -1]
            if padded.any() and bool((ends == ends[:1]).all()) and len(run.unique()) > 1:
                pad = torch.arange(values.shape[1]) >= (values.shape[1] - run * padded)[:, None].cpu()
                if float(pad.double().mean()) > _SHARE and not bool(pad.all(1).any()):
                    return pad
    return None


def _positions(pad: Tensor, x: Tensor) -> Tensor | None:
    """Which values of a layer's input are not padding, `[N, L]` or `[N·L]`; None where it has no sequences."""
    size, length = pad.shape
    if x.dim() == 3 and len(x) == size:
        stretched = F.interpolate(pad[:, None].float(), size=x.shape[2], mode="nearest")
        return (stretched[:, 0] < 0.5).to(x.device)
    if x.dim() == 2 and len(x) == size * length:
        return (~pad).flatten().to(x.device)
    return None
