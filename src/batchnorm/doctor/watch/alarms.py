"""Which of the doctor's rules fire while a model trains."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

from torch import nn

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.layers import Layer, Off, counted, listed
from batchnorm.doctor.measure.passes import Data
from batchnorm.doctor.measure.probe import Probe
from batchnorm.doctor.measure.step import Step
from batchnorm.doctor.watch.record import Held, Look, Record, noise_size
from batchnorm.models.progress import Bar

# A running average follows within so many times 1/momentum steps; what it has no horizon for counts as momentum 0.1.
_HORIZONS, _USUAL = 5, 0.1
# Looks by which that has to be seen, and those over whose median noise is judged.
_LASTING = 5


class BatchNormWarning(UserWarning):
    """Something is wrong with a model's batch normalization, seen while it trains."""


@dataclass(frozen=True)
class Seen:
    """All layers in one step, in the model's order.

    Attributes:
        step: Its number.
        model_calls: The most calls of the model without a backward pass between them; 0 where that is not known.
        layers: The layers; their `calls` and `samples` are those of this step.
        looks: What each was seen to do.
        held: What each holds after the step.
        records: What is kept of it.
    """

    step: int
    model_calls: int
    layers: list[Layer]
    looks: list[Look]
    held: list[Held]
    records: list[Record]


@dataclass
class _Past:
    """What a layer has been like."""

    off_since: int | None = None
    off_looks: int = 0
    noise: deque[float] = field(default_factory=lambda: deque(maxlen=_LASTING))
    least_dead: float = math.inf


class Alarms:
    """Applies what a rule of the doctor looks for to each step, and lets the rule say it, once for each layer.

    What a single step shows for certain is said at once. Whether running statistics are off is judged over several of
    their horizons: for a while every running average is behind a network that learns.
    """

    def __init__(self, model: nn.Module) -> None:
        # Two dozen modules that `import batchnorm` does without.
        from batchnorm.doctor.rules.bn102_stale_statistics import StaleStatistics
        from batchnorm.doctor.rules.bn104_small_batch import AIM, NOISY, SmallBatch
        from batchnorm.doctor.rules.bn106_moved_twice import MovedTwice
        from batchnorm.doctor.rules.bn202_broken_statistics import BrokenStatistics
        from batchnorm.doctor.rules.bn206_dead_channels import SHARE, DeadChannels

        self._model = model
        self._twice, self._broken, self._dead = MovedTwice(), BrokenStatistics(), DeadChannels()
        self._small, self._stale = SmallBatch(), StaleStatistics()
        self._dead_share, self._noisy, self._aim = SHARE, NOISY, AIM
        self._past: dict[str, _Past] = defaultdict(_Past)
        self._said: set[tuple[str, str]] = set()

    def findings(self, seen: Seen) -> list[Finding]:
        """What is found in this step that was not found before."""
        found = [*self._moved_twice(seen), *self._not_finite(seen), *self._grown_dead(seen)]
        found += [*self._noisy_batch(seen), *self._off(seen)]
        self._said |= {(finding.code, path) for finding in found for path in finding.paths}
        return found

    def _new(self, code: str, layers: Iterable[Layer]) -> list[Layer]:
        return [layer for layer in layers if (code, layer.path) not in self._said]

    def _probe(self, layers: list[Layer], step: Step | None = None, batch_size: int | None = None) -> Probe:
        probe = Probe(self._model, None, layers, True, True, 0, Bar(), step=step)
        if batch_size is not None:
            probe.data = Data(lambda model, batch: None, None, sizes=[batch_size])
        return probe

    def _moved_twice(self, seen: Seen) -> Iterator[Finding]:
        step = Step(model_calls=seen.model_calls)
        layers: list[Layer] = []
        for layer, look, record in zip(seen.layers, seen.looks, seen.records, strict=True):
            again = 0 if record.updates is None else min(look.backward, record.updates - look.forward)
            calls = 0 if record.updates is None else min(seen.model_calls, record.updates - again)
            if (again > 0 or calls > 1) and self._new(self._twice.code, [layer]):
                step.backward[len(layers)], step.forward[len(layers)] = again, calls
                layers.append(layer)
        if layers:
            size = next((r.batch_size for r in seen.records if r.batch_size is not None), 1)
            step.backward, step.forward = Counter(+step.backward), Counter(+step.forward)
            yield from self._twice.check(self._probe(layers, step, size))

    def _not_finite(self, seen: Seen) -> Iterator[Finding]:
        broken = [layer for layer, held in zip(seen.layers, seen.held, strict=True) if not held.finite]
        if layers := self._new(self._broken.code, broken):
            yield from self._broken.check(self._probe(layers))

    def _grown_dead(self, seen: Seen) -> Iterator[Finding]:
        """Not those that are dead from the start: a residual branch often begins with γ = 0."""
        grown = []
        for layer, record in zip(seen.layers, seen.records, strict=True):
            past = self._past[layer.path]
            if record.dead - past.least_dead >= self._dead_share / 2 and record.dead >= self._dead_share:
                grown.append(layer)
            past.least_dead = min(past.least_dead, record.dead)
        if layers := self._new(self._dead.code, grown):
            yield from self._dead.check(self._probe(layers))

    def _noisy_batch(self, seen: Seen) -> Iterator[Finding]:
        noise: dict[str, float] = {}
        size = 0.0
        for layer, look, record in zip(seen.layers, seen.looks, seen.records, strict=True):
            past = self._past[layer.path].noise
            past.append(record.noise)
            if not layer.by_batch or look.batch_size is None or not self._new(self._small.code, [layer]):
                continue
            if len(past) == _LASTING and median(past) >= self._noisy:
                noise[layer.path] = median(past)
                size = noise_size(layer.module, look.batch_size)
        if noise:
            worst = sorted(noise, key=lambda path: -noise[path])
            most = noise[worst[0]]
            needed = math.ceil(size * (most / self._aim) ** 2)
            yield self._small.finding(
                Severity.NOTE,
                worst,
                f"at {size:g} samples a normalized value at {worst[0] or '(model)'} moves by {most:.2g}σ with the rest "
                f"of its batch; {self._aim}σ takes about {needed}",
                evidence=[f"{path or '(model)'}: {noise[path]:.2g}σ" for path in worst[1:5]],
                confidence="medium",
                batch_size=size,
                noise=noise,
                batch_size_needed=needed,
            )

    def _off(self, seen: Seen) -> Iterator[Finding]:
        offs: dict[Off, int] = {}
        for layer, record in zip(seen.layers, seen.records, strict=True):
            past = self._past[layer.path]
            off = Off(layer, record.mean_distance, abs(record.log_ratio) / 2, math.nan, math.nan)
            if not off.matters:
                past.off_since, past.off_looks = None, 0
                continue
            past.off_since = seen.step if past.off_since is None else past.off_since
            past.off_looks += 1
            since = seen.step - past.off_since
            momentum = getattr(layer.module, "momentum", None) or _USUAL
            lasting = past.off_looks >= _LASTING and since >= _HORIZONS / momentum
            if lasting and layer.by_batch and self._new(self._stale.code, [layer]):
                offs[off] = since
        if not offs:
            return
        worst = sorted(offs, key=lambda off: -max(off.shift, off.scale))
        paths = [off.layer.path for off in worst]
        yield self._stale.finding(
            Severity.WARNING,
            paths,
            f"{counted(len(offs), 'layer is', 'layers are')} off for {counted(max(offs.values()), 'step')}: "
            + listed(paths),
            evidence=[_said(off) for off in worst[:5]],
            repair=_repair(self._stale.repair, worst[0].layer),
            confidence="medium",
            layers={off.layer.path: {"shift": off.shift, "scale": off.scale} for off in worst},
        )


def _said(off: Off) -> str:
    momentum = getattr(off.layer.module, "momentum", None)
    return (
        f"{off.layer.path or '(model)'}: running mean off by {off.shift:.2g}σ, running σ by a factor of "
        f"{math.exp(off.scale):.2f}, momentum {momentum if momentum is None else f'{momentum:g}'}"
    )


def _repair(after: str, layer: Layer) -> str:
    """For training that goes on, besides the doctor's for the weights as they are."""
    momentum = getattr(layer.module, "momentum", None)
    if momentum:
        return after
    return (
        "for found in batchnorm.walk.norm_layers(model):\n"
        f"    found.module.momentum = {_USUAL}  # {'never forgets' if momentum is None else 'never moves'} as it is\n"
        f"{after}  # when training has ended"
    )
