"""Why running statistics do not fit the data: the weights have moved since, or the data are others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.fx.node import Node

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.measure.layers import Layer, Off, counted
from batchnorm.doctor.measure.probe import Probe

# Of the deviation that a layer's weights cannot have from any change of its input, less than the first speaks for a
# change of the data, more than the second for a change of the weights.
_DATA, _WEIGHTS = 0.35, 0.7
# Weight of the initial values, (1 - momentum)^updates, from which on the running average has not caught up.
LAGS = 0.05
# Deviations by which a running mean has to be off for that to be seen.
_SEEN = 0.1
# Divergence up to which the first layer fits the data, in nats.
_FITS = 0.02
# Size of a common factor of σ, and by how much of it the channels' factors may differ.
_SCALED, _ALIKE = 0.2, 0.25


@dataclass(frozen=True)
class Cause:
    """`stale`, `shift`, `dropout` or `unknown`, and what speaks for it."""

    kind: str
    evidence: tuple[str, ...]


def suspects(probe: Probe, by: Effect) -> list[Off]:
    """The layers that are off, worst first; where they do harm together, also those that are less so by themselves."""
    offs = sorted(probe.off, key=lambda found: -found.divergence)
    harm = by.severity > Severity.NOTE
    return [one for one in offs if one.matters or (harm and one.divergence > offs[0].divergence / 4)]


def cause(probe: Probe, offs: list[Off]) -> Cause:
    """Why these layers are off.

    The mean of a convolution's output over samples and positions is S·m, with m the means of its input channels and S
    the sums of its weights. Whatever changes in the data, running mean and measured mean then differ by a vector in the
    range of S; after a change of the weights they do not. With more outputs than inputs this can be seen.
    """
    behind = [(found, lag) for found in offs if (lag := initial(found.layer)) > LAGS]
    if 2 * len(behind) >= len(offs):
        lag = median(lag for _, lag in behind)
        return Cause(
            "stale",
            (f"{len(behind)} of {counted(len(offs), 'layer still holds', 'layers still hold')} {lag:.0%} of their "
             "initial values: too few updates for their momentum",),
        )  # fmt: skip
    entry = next((found for found in offs if _is_input(found)), None)
    if entry is not None:
        return Cause("shift", (f"{entry.layer.path!r} normalizes the data themselves, and no weights come before it",))
    if 2 * sum(found.layer in probe.random_scale for found in offs) >= len(offs):
        return Cause("dropout", ("in training their inputs deviate more, by dropout",))
    # What a layer is given also changes by the weights before it: only the first that is off speaks for the data.
    called = sorted(probe.off, key=lambda found: found.layer.order)
    shares = [(found, _outside(probe, found)) for found in called if found.shift > _SEEN]
    first, share = shares[0] if shares else (called[0], None)
    later = [(found, share) for found, share in shares[1:] if share is not None and share > _WEIGHTS]
    if share is None and later:
        first, share = later[0]
    if share is not None:
        said = (
            f"{share:.0%} of how far the running means of {first.layer.path!r} are off cannot come from any change of "
            "its input (100% is what changed weights give)"
        )
        return Cause("shift" if share < _DATA else "stale" if share > _WEIGHTS else "unknown", (said,))
    entry = called[0]
    if entry.scale > _SCALED and entry.uneven < _ALIKE * entry.scale:
        said = f"all channels of the first layer, {entry.layer.path!r}, have σ off by nearly the same factor"
        return Cause("shift", (f"{said}, as data of another scale give and changed weights do not",))
    if not entry.matters and entry.divergence < _FITS and len(called) > 1:
        said = f"the first layer, {entry.layer.path!r}, still fits these data, so that they have not changed"
        return Cause("stale", (said,))
    return Cause("unknown", ("no layer before which the weights would show whether they or the data changed",))


def initial(layer: Layer) -> float:
    """How much of the initial values is left in the running statistics."""
    if layer.is_new():
        return 1.0
    momentum, updates = getattr(layer.module, "momentum", None), layer.updates
    if momentum is None or not updates:  # without updates counted it is not from here, or counts nothing
        return 0.0
    return math.pow(1 - min(float(momentum), 1.0), updates)


def _is_input(found: Off) -> bool:
    return found.layer.place is not None and found.layer.place.source.op == "placeholder"


def _outside(probe: Probe, found: Off) -> float | None:
    """The share of a layer's deviation outside the range of S, as a share of that of a random vector."""
    place, population = found.layer.place, found.layer.population
    if probe.trace is None or place is None or not place.follows_linear or population is None:
        return None
    weight = _weight(probe, place.source)
    if weight is None or found.layer.before is None:
        return None
    sums = weight.detach().double().cpu().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().double().cpu()
    channels, inputs = sums.shape
    if channels != len(population.mean) or channels < 2 * inputs:
        return None
    scale = (population.var + found.layer.eps).sqrt().cpu()
    sums = sums / scale[:, None]
    deviation = (found.layer.before.mean[0].cpu() - population.mean.cpu()) / scale
    within = sums @ torch.linalg.lstsq(sums, deviation[:, None], driver="gelsd").solution
    outside = float((deviation - within[:, 0]).norm() / deviation.norm().clamp_min(1e-30))
    return outside / math.sqrt((channels - inputs) / channels)


def _weight(probe: Probe, call: Node) -> Tensor | None:
    """Of an ordinary convolution or linear layer: grouped ones see their own channels only."""
    argument = call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")
    groups = call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", 1)
    if "transpose" in getattr(call.target, "__name__", "") or groups != 1:
        return None
    return probe.tensor(argument)
