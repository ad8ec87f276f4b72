"""BN202: statistics that no data can have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule


class BrokenStatistics(Rule):
    """NaN, infinity, or a variance below zero."""

    code = "BN202"
    title = "statistics or parameters are not finite, or a variance is negative"
    why = (
        "One batch with NaN or infinity stays in a running average for ever, as does the overflow of a half type. In "
        "evaluation the channel is NaN from then on; training goes on and does not show it."
    )
    repair = (
        "for found in batchnorm.walk.norm_layers(model):\n"
        "    found.module.reset_running_stats()  # NaN in γ or β has to be trained again\n"
        "model, report = batchnorm.recalibrate(model, training_data)"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """Of every layer's buffers and parameters."""
        broken = {layer.path: number for layer in probe.layers if (number := _broken(layer))}
        if broken:
            yield self.finding(
                Severity.ERROR,
                broken,
                f"{counted(sum(broken.values()), 'channel')} of {counted(len(broken), 'layer')}: {listed(broken)}",
                evidence=[
                    f"{path or '(model)'}: {counted(number, 'channel')}" for path, number in list(broken.items())[:5]
                ],
                channels=broken,
            )


def _broken(layer: Layer) -> int:
    """How many channels."""
    vectors = [
        *(parameter.detach() for parameter in layer.affine),
        *(v for n in ("running_mean", "running_var") if isinstance(v := getattr(layer.module, n, None), torch.Tensor)),
    ]
    bad: torch.Tensor | None = None
    for vector in vectors:
        here = ~vector.isfinite()
        if vector is getattr(layer.module, "running_var", None):
            here |= vector < 0
        rows = here.reshape(-1, here.shape[-1]).any(0).cpu()
        bad = rows if bad is None or bad.shape != rows.shape else bad | rows
    return 0 if bad is None else int(bad.sum())
