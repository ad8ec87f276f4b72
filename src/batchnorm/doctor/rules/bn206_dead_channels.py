"""BN206: channels that say nothing."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.facts import DEAD
from batchnorm.doctor.measure.layers import counted, listed
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.rules.rule import Rule

# Share of a layer's channels that is worth a word.
SHARE = 0.25


class DeadChannels(Rule):
    """A note: the network as it is works without them; they cost time and memory."""

    code = "BN206"
    title = "many channels have γ = 0"
    why = (
        "A channel with γ near 0 puts out its β whatever comes in. Too much weight decay or learning rate leaves many "
        "of them; pruning makes them on purpose, and γ = 0 throughout a layer is how a residual branch is often "
        "initialized."
    )
    repair = (
        "groups = batchnorm.parameter_groups(model, weight_decay=1e-4)  # keeps γ out of weight decay; or prune them"
    )

    def check(self, probe: Probe) -> Iterator[Finding]:
        """By |γ|, in layers that are not all zero."""
        dead, share = {}, {}
        for layer in probe.layers:
            weight = getattr(layer.module, "weight", None)
            if not isinstance(weight, Tensor):
                continue
            small = weight.detach().abs() < DEAD
            if bool((weight == 0).all()):
                continue
            share[layer.path], dead[layer.path] = float(small.double().mean()), int(small.sum())
        found = sorted((path for path in share if share[path] >= SHARE), key=lambda path: -share[path])
        if found:
            yield self.finding(
                Severity.NOTE,
                found,
                f"{counted(sum(dead[path] for path in found), 'channel')} of {counted(len(found), 'layer')}: "
                f"{listed(found)}",
                evidence=[f"{path or '(model)'}: {share[path]:.0%} of its channels" for path in found[:5]],
                share={path: share[path] for path in found},
            )
