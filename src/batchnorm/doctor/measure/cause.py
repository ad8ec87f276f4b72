"""Find why running statistics do not fit the data: the weights have changed, or the data are different."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.doctor.finding import Severity, one_less
from batchnorm.doctor.measure.distance import Distance
from batchnorm.doctor.measure.effect import Effect
from batchnorm.doctor.measure.initial_share import estimated_share
from batchnorm.doctor.measure.layers import Layer, median, remaining
from batchnorm.doctor.wording import counted, listed, named

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

# Names of classes that hold averaged weights, in libraries that have their own.
_AVERAGES = re.compile(r"Averag|EMA(?![a-z])|Ema(?![a-z])|SWA")

_LAG = "a learning rate that is still high explains how far off the running statistics are"
_SLIGHTLY = "a learning rate that is still high, or averaged weights, explain how far off the running statistics are"
_CHANGED = (
    "the weights changed after the running statistics, for example by averaging (SWA, EMA), pruning, quantization or "
    "training in evaluation mode"
)
_UNSURE = "unsure: either the weights changed after the statistics, or these are not the training data (BN103)"


@dataclass(frozen=True)
class Cause:
    """The cause of a misfit.

    Attributes:
        kind: `stale` (the weights have changed), `averaged` (by averaging), `lag` (a high learning rate explains it),
            `momentum` (too few updates), `shift` (the data are different), `dropout` or `unknown`.
        evidence: Lines with figures.
        summary: The cause in one line; empty if the number of layers that are off serves as the summary.
    """

    kind: str
    evidence: tuple[str, ...] = ()
    summary: str = ""

    @classmethod
    def lag(cls, evidence: tuple[str, ...], summary: str = _LAG) -> Cause:
        """Return the cause of statistics that lag behind weights that change fast."""
        return cls("lag", tuple(line for line in evidence if line != _UNSURE), summary)

    @property
    def may_be_lag(self) -> bool:
        """Whether the weights may have changed by training alone."""
        return self.kind == "unknown" or (self.kind == "stale" and self.summary == _CHANGED)

    def with_evidence(self, line: str) -> Cause:
        """Return the cause with one more line of evidence."""
        return replace(self, evidence=(*self.evidence, line))


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
        """The arguments of `Rule.finding` for the rule of the cause."""
        number = f"{len(self.distances)} of {counted(self.compared, 'layer')}"
        off = f"{number} {'is' if len(self.distances) == 1 else 'are'} off: {listed(self.paths, 3)}"
        severity = self.effect.severity
        return {
            "severity": one_less(severity) if self.cause.kind == "lag" else severity,
            "effect": self.effect,
            "paths": self.paths,
            "summary": self.cause.summary or off,
            "evidence": [
                f"running statistics against the population's: {self.effect}",
                *self.cause.evidence,
                *([off] if self.cause.summary else []),
                *(f"{distance}, divergence {distance.divergence:.2g} nats" for distance in self.distances[:5]),
            ],
            "cause": self.cause.kind,
            "signs": self.cause.evidence,
            "layers": {
                d.layer.path: {"shift": d.shift, "log_scale": d.scale, "divergence": d.divergence}
                for d in self.distances
            },
        }


def suspects(distances: tuple[Distance, ...], effect: Effect, gap: Effect | None) -> tuple[Distance, ...]:
    """Return the layers that are off, worst first.

    If the running statistics do harm, or cause most of the harm in evaluation, layers that are off by less count too,
    because several of them may cause the harm together.
    """
    ranked = sorted(distances, key=lambda distance: -distance.divergence)
    harm = effect.severity > Severity.NOTE
    if gap is not None and gap.severity > Severity.NOTE and gap.loss is not None and effect.loss is not None:
        harm = harm or effect.loss > gap.loss / 2
    return tuple(d for d in ranked if d.matters or (harm and d.divergence > ranked[0].divergence / 4))


def cause_of(
    off: tuple[Distance, ...],
    distances: tuple[Distance, ...],
    dropout_scale: Mapping[str, float],
    averaged: str,
) -> Cause:
    """Return why the layers `off`, among all `distances`, do not fit the data.

    Args:
        off: The layers that do not fit, worst first.
        distances: All layers that can be compared.
        dropout_scale: The layers whose input dropout changes.
        averaged: Why the weights are known to be averages; empty if they are not.
    """
    cause = (
        _too_few_updates(off, distances)
        or _of_the_data(off)
        or _of_dropout(off, dropout_scale)
        or _of_weights_or_data(distances)
    )
    if averaged and (cause.kind in ("stale", "unknown") or (cause.kind == "shift" and _are_smaller(distances))):
        summary = "the weights are averages, but the running statistics belong to other weights"
        return Cause("averaged", (averaged,), summary)
    if cause.kind in ("stale", "unknown") and not cause.summary and not any(distance.matters for distance in off):
        return Cause.lag(cause.evidence, _SLIGHTLY)
    if cause.kind == "stale" and not cause.summary:
        return replace(cause, summary=_CHANGED)
    if cause.kind == "shift":
        first = min(off, key=lambda distance: distance.layer.order)
        behind = "from those behind the running statistics"
        return replace(cause, summary=f"the data {first.as_change} {behind}, at {named(first.layer.path)}")
    return cause


def averaging_by_name(kind: str) -> str:
    """Return why the weights of a model of this class seem to be averages, by its name; empty if they do not."""
    return f"{kind} is named after averaging" if _AVERAGES.search(kind) else ""


def _too_few_updates(off: tuple[Distance, ...], distances: tuple[Distance, ...]) -> Cause | None:
    layers = [distance.layer for distance in off]
    lags = [layer for layer in layers if layer.initial_share() > LAGS]
    estimated = 0.0
    if 2 * len(lags) < len(off):
        uncounted = [distance.layer for distance in distances if _is_uncounted(distance.layer)]
        estimated = estimated_share(uncounted)
        lags += [layer for layer in layers if estimated > LAGS and layer in uncounted]
    if 2 * len(lags) < len(off):
        return None
    number = f"{len(lags)} of {counted(len(off), 'layer')}"
    new = [layer.path for layer in lags if layer.is_new()]
    if 2 * len(new) >= len(lags):
        return Cause("stale", summary=f"{len(new)} of {counted(len(off), 'layer')} never updated: {listed(new, 3)}")
    remain = f"more than {LAGS:.0%} of the initial values remain in {number} that are off"
    worst = max((layer for layer in lags if not layer.is_new()), key=Layer.initial_share)
    return Cause("momentum", (remain,), _kept_by_estimate(worst, estimated) if estimated else kept(worst))


def _is_uncounted(layer: Layer) -> bool:
    return layer.updates_running and layer.momentum is not None and not layer.updates and not layer.is_new()


def _kept_by_estimate(layer: Layer, share: float) -> str:
    """Return a phrase with the estimated share of the initial statistics in layers that count no updates."""
    left = f"about {share:.0%} of the initial running statistics"
    return f"{layer.momentum_as_set} keeps {left} (estimated: the layers count no updates)"


def kept(layer: Layer, updates: int | None = None) -> str:
    """Return a phrase with the share of a layer's initial statistics that is left after these or all updates."""
    updates = layer.updates if updates is None else updates
    share = f"{remaining(layer.momentum, updates):.0%} of the initial running statistics"
    return f"{layer.momentum_as_set} over {counted(updates or 0, 'step')} keeps {share}"


def _of_the_data(off: tuple[Distance, ...]) -> Cause | None:
    entry = next((distance for distance in off if _normalizes_data(distance)), None)
    if entry is None:
        return None
    return Cause("shift", (f"{entry.layer.path!r} normalizes the data themselves, with no weights before it",))


def _of_dropout(off: tuple[Distance, ...], dropout_scale: Mapping[str, float]) -> Cause | None:
    if 2 * sum(distance.layer.path in dropout_scale for distance in off) < len(off):
        return None
    return Cause("dropout", ("dropout increases the variance of their inputs in training",))


def _of_weights_or_data(distances: tuple[Distance, ...]) -> Cause:
    """Return whether the weights or the data have changed.

    The mean of a convolution's output over samples and positions is S·m, where m are the means of its input channels
    and S are the sums of its weights. After a change of the data, running mean and measured mean differ by a vector in
    the range of S. After a change of the weights, they do not. The two cases can be distinguished if there are more
    outputs than inputs.
    """
    # Changed weights also change the inputs of later layers, so only the first layer that is off indicates the data.
    called = sorted(distances, key=lambda distance: distance.layer.order)
    shares = [(d, _unexplained_share(d)) for d in called if d.shift > _MEASURABLE]
    first, share = shares[0] if shares else (called[0], None)
    later = [(d, share) for d, share in shares[1:] if share is not None and share > _WEIGHTS]
    if share is None and later:
        first, share = later[0]
    if share is not None:
        shift = f"the shift of the running means of {first.layer.path!r}"
        line = f"{share:.0%} of {shift} is explained by changed weights"
        if share < _DATA:
            return Cause("shift", (f"{line}, the rest by the data",))
        if share > 1:  # more than of a random vector, by chance
            return Cause("stale", (f"{shift} is explained by changed weights, not by the data",))
        return Cause("stale", (f"{line}, not by the data",)) if share > _WEIGHTS else Cause("unknown", (line, _UNSURE))
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


def _are_smaller(distances: tuple[Distance, ...]) -> bool:
    """Return whether the inputs of the first layer are smaller, but not the data.

    Averaging makes weights smaller, and with them σ. The inputs of all later layers then change as with other data.
    """
    first = min(distances, key=lambda distance: distance.layer.order)
    population, running = first.layer.population, first.layer.running
    if population is None or running is None or _normalizes_data(first):
        return False
    return first.scale > _SCALED and median(population.var) < median(running.var[0])


def _normalizes_data(distance: Distance) -> bool:
    return distance.layer.place is not None and distance.layer.place.normalizes_data


@np.errstate(all="ignore")
def _unexplained_share(distance: Distance) -> float | None:
    """Return the share of a layer's deviation outside the range of S, relative to that of a random vector."""
    layer = distance.layer
    place, population = layer.place, layer.population
    if place is None or place.weight_sums is None or population is None or layer.running is None:
        return None
    sums = place.weight_sums()
    channels, inputs = sums.shape
    if channels != len(population.mean) or channels < 2 * inputs:
        return None
    scale = np.sqrt(population.var + layer.eps)
    sums = sums / scale[:, None]
    deviation = (layer.running.mean[0] - population.mean) / scale
    if not np.isfinite(sums).all():  # of weights, or of a constant channel without ε
        return None
    within = sums @ np.linalg.lstsq(sums, deviation, rcond=None)[0]
    outside = float(np.linalg.norm(deviation - within) / max(np.linalg.norm(deviation), 1e-30))
    return outside / math.sqrt((channels - inputs) / channels)
