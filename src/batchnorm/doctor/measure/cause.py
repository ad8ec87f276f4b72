"""Find why running statistics do not fit the data: the weights have changed, or the data are different."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor
from torch.fx.node import Node
from torch.linalg import lstsq

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.distance import Distance
from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.measure.traced import tensor_of
from batchnorm.doctor.wording import counted, listed
from batchnorm.models.model_graph import Trace

# Share of a layer's deviation that no change of its input can cause. Below the first value, the data have changed.
# Above the second, the weights have changed.
_DATA, _WEIGHTS = 0.35, 0.7
# The running average lags behind if its initial values have more than this weight, (1 - momentum)^updates.
LAGS = 0.05
# Distance of a running mean, in σ, from which its direction can be measured.
_MEASURABLE = 0.1
# Divergence up to which the first layer fits the data, in nats.
_FITS = 0.02
# Smallest common factor of σ, and largest difference of the channels' own factors, relative to the common one.
_SCALED, _UNEVEN = 0.2, 0.25

_UNSURE = "unsure: either the weights changed after the statistics, or these are not the training data (BN103)"


@dataclass(frozen=True)
class Cause:
    """The cause: `stale`, `shift`, `dropout` or `unknown`, and the evidence for it."""

    kind: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Misfit:
    """Layers whose running statistics do not fit the data.

    Attributes:
        distances: The layers, worst first.
        compared: Number of layers that could be compared.
        effect: Effect of the running statistics against the population's.
        cause: Why they do not fit.
    """

    distances: tuple[Distance, ...]
    compared: int
    effect: Effect
    cause: Cause

    @property
    def paths(self) -> list[str]:
        """The paths of the layers, worst first."""
        return [distance.layer.path for distance in self.distances]

    @property
    def finding(self) -> dict[str, Any]:
        """The arguments of `Rule.finding` for BN102 and BN103."""
        off = counted(self.compared, "layer is", "layers are")
        return {
            "severity": self.effect.severity,
            "effect": self.effect,
            "paths": self.paths,
            "summary": f"{len(self.distances)} of {off} off: {listed(self.paths, 3)}",
            "evidence": [
                f"running statistics against the population's: {self.effect}",
                *self.cause.evidence,
                *(f"{distance}, divergence {distance.divergence:.2g} nats" for distance in self.distances[:5]),
            ],
            "cause": self.cause.kind,
            "layers": {
                d.layer.path: {"shift": d.shift, "log_scale": d.scale, "divergence": d.divergence}
                for d in self.distances
            },
        }


def suspects(distances: tuple[Distance, ...], effect: Effect) -> tuple[Distance, ...]:
    """Return the layers that are off, worst first.

    If the running statistics do harm, layers that are off by less count, too, because they may cause the harm together.
    """
    ranked = sorted(distances, key=lambda distance: -distance.divergence)
    harm = effect.severity > Severity.NOTE
    return tuple(d for d in ranked if d.matters or (harm and d.divergence > ranked[0].divergence / 4))


def cause_of(
    off: tuple[Distance, ...],
    distances: tuple[Distance, ...],
    trace: Trace | None,
    dropout_scale: dict[str, float],
) -> Cause:
    """Return why the layers `off`, among all `distances`, do not fit the data.

    The mean of a convolution's output over samples and positions is S·m, where m are the means of its input channels
    and S are the sums of its weights. After a change of the data, running mean and measured mean differ by a vector in
    the range of S. After a change of the weights, they do not. The two cases can be distinguished if there are more
    outputs than inputs.
    """
    lags = [lag for distance in off if (lag := distance.layer.initial_share()) > LAGS]
    if 2 * len(lags) >= len(off):
        hold = counted(len(off), "layer still holds", "layers still hold")
        return Cause(
            "stale",
            (f"{len(lags)} of {hold} {median(lags):.0%} of their initial values: too few updates for their momentum",),
        )
    entry = next((distance for distance in off if _normalizes_data(distance)), None)
    if entry is not None:
        return Cause("shift", (f"{entry.layer.path!r} normalizes the data themselves, with no weights before it",))
    if 2 * sum(distance.layer.path in dropout_scale for distance in off) >= len(off):
        return Cause("dropout", ("dropout makes their inputs deviate more in training",))
    # Changed weights also change the inputs of later layers, so only the first layer that is off indicates the data.
    called = sorted(distances, key=lambda distance: distance.layer.order)
    shares = [(d, _unexplained_share(d, trace)) for d in called if d.shift > _MEASURABLE]
    first, share = shares[0] if shares else (called[0], None)
    later = [(d, share) for d, share in shares[1:] if share is not None and share > _WEIGHTS]
    if share is None and later:
        first, share = later[0]
    if share is not None:
        shift = f"the shift of the running means of {first.layer.path!r}"
        line = f"{min(share, 1.0):.0%} of {shift} is explained by changed weights"
        if share < _DATA:
            return Cause("shift", (f"{line}, the rest by the data",))
        if share > _WEIGHTS:
            return Cause("stale", (f"{line}, not by the data",))
        return Cause("unknown", (line, _UNSURE))
    entry = called[0]
    if entry.scale > _SCALED and entry.unevenness < _UNEVEN * entry.scale:
        return Cause(
            "shift",
            (
                f"in the first layer, {entry.layer.path!r}, σ is off by nearly the same factor in every channel; data "
                "of another scale cause this, changed weights do not",
            ),
        )
    if not entry.matters and entry.divergence < _FITS and len(called) > 1:
        return Cause("stale", (f"the first layer, {entry.layer.path!r}, still fits: the data have not changed",))
    return Cause("unknown", ("no layer shows whether weights or data changed", _UNSURE))


def _normalizes_data(distance: Distance) -> bool:
    return distance.layer.place is not None and distance.layer.place.source.op == "placeholder"


def _unexplained_share(distance: Distance, trace: Trace | None) -> float | None:
    """Return the share of a layer's deviation outside the range of S, relative to that of a random vector."""
    layer = distance.layer
    place, population = layer.place, layer.population
    if trace is None or place is None or not place.follows_linear or population is None or layer.running is None:
        return None
    weight = _weight_of(place.source, trace)
    if weight is None:
        return None
    sums = weight.detach().double().cpu().flatten(2).sum(2) if weight.dim() > 2 else weight.detach().double().cpu()
    channels, inputs = sums.shape
    if channels != len(population.mean) or channels < 2 * inputs:
        return None
    scale = (population.var + layer.eps).sqrt().cpu()
    sums = sums / scale[:, None]
    deviation = (layer.running.mean[0].cpu() - population.mean.cpu()) / scale
    within = sums @ lstsq(sums, deviation[:, None], driver="gelsd").solution
    outside = float((deviation - within[:, 0]).norm() / deviation.norm().clamp_min(1e-30))
    return outside / math.sqrt((channels - inputs) / channels)


def _weight_of(call: Node, trace: Trace) -> Tensor | None:
    """Return the weight of a plain convolution or linear layer; a grouped one sees only its own channels."""
    argument = call.args[1] if len(call.args) > 1 else call.kwargs.get("weight")
    groups = call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", 1)
    if "transpose" in getattr(call.target, "__name__", "") or groups != 1:
        return None
    return tensor_of(argument, trace)
