"""Apply the doctor's rules to a model while it trains."""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

from torch import nn

from batchnorm.doctor.finding import Finding, Severity
from batchnorm.doctor.measure.cause import LAGS, kept
from batchnorm.doctor.measure.distance import Distance
from batchnorm.doctor.measure.layers import DEAD_SHARE, NOISE_AIM, NOISY, Layer, Vectors, remaining, samples_needed
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.training_step import TrainingStep
from batchnorm.doctor.pytorch.layers import vectors_of
from batchnorm.doctor.rules import load_rules
from batchnorm.doctor.watching.inputs import InputBatches
from batchnorm.doctor.watching.observing import StepObserver
from batchnorm.doctor.watching.records import LayerState, Observation, Record, samples_sharing_statistics
from batchnorm.doctor.wording import counted, layers_listed, listed, named, noise_at

# A running average adapts within this many times 1/momentum steps. A layer without a momentum counts as having torch's.
_HORIZONS, _USUAL_MOMENTUM = 5, 0.1
# Number of looks that a problem must last, and number of looks in the median of the noise.
_LASTING = 5
# From this step on, the weight of the initial values is reported: during the training if it is above the second value.
_LONG, _STAYS = 50, 0.9


class BatchNormWarning(UserWarning):
    """Something is wrong with the batch normalization of a model during training."""


@dataclass(frozen=True)
class ObservedLayer:
    """One layer in an observed step.

    Attributes:
        layer: The layer; its `calls` and `samples` are those of this step.
        module: Its module.
        observation: Its calls and its first batch in the step.
        state: Its parameters and statistics after the step.
        record: The record of the step.
    """

    layer: Layer
    module: nn.Module
    observation: Observation
    state: LayerState
    record: Record


@dataclass
class _History:
    """Earlier values of a layer."""

    off_since: int | None = None
    off_looks: int = 0
    noise: deque[float] = field(default_factory=lambda: deque(maxlen=_LASTING))
    least_dead: float = math.inf
    last: ObservedLayer | None = None
    updates_of_steps: set[int | None] = field(default_factory=set)

    def updated_outside(self, one: ObservedLayer) -> tuple[int, int]:
        """Return the number of steps since the last look, and of updates that these do not explain."""
        updates, last = one.record.updates, self.last
        if last is None or updates is None or len(self.updates_of_steps) != 1:
            return 0, 0
        steps = one.record.step - 1 - last.record.step
        each = next(iter(self.updates_of_steps)) or 0
        return steps, (one.state.updates or 0) - updates - (last.state.updates or 0) - steps * each


class Alarms:
    """Apply rules of the doctor to each observed step, and report each problem once for each layer.

    A problem that a single step proves is reported at once. Running statistics must be off for several of their
    horizons, because every running average lags behind a network that learns.

    Args:
        model: The class of the model.
        sharded: The modules whose parameters cannot be read between steps.
    """

    def __init__(self, model: str, sharded: Collection[nn.Module]) -> None:
        self._model = model
        self._sharded = sharded
        self._inputs = InputBatches()
        self._ordinary = 0  # looks at steps without an evaluation
        self._rules = {rule.code: rule() for rule in load_rules()}
        self._history: dict[str, _History] = defaultdict(_History)
        self._reported: set[tuple[str, str]] = set()

    def findings(self, step: int, seen: StepObserver, observed: list[ObservedLayer]) -> list[Finding]:
        """Return the new findings of a step.

        Args:
            step: Its number.
            seen: What was seen of the step.
            observed: All layers, in the model's order.
        """
        found = [*self._evaluated(observed, seen.evaluations), *self._updated_twice(observed, seen.model_calls)]
        found += [*self._not_finite(observed), *self._dying(observed), *self._half_frozen(observed)]
        found += [*self._after_dropout(observed, seen.dropout), *self._dependent(observed, seen)]
        found += [*self._early(observed, step, _STAYS), *self._noisy(observed), *self._off(observed, step)]
        self._remember(found)
        for one in observed:
            self._history[one.layer.path].last = one
        return found

    def at_the_end(self, step: int) -> list[Finding]:
        """Return the findings at the end of the training, whose number of steps was not known before."""
        observed = [history.last for history in self._history.values() if history.last is not None]
        off = [one for one in observed if _distance(one).matters]
        found = list(self._early(off, step, LAGS))
        self._remember(found)
        return found

    def _remember(self, found: list[Finding]) -> None:
        self._reported |= {(finding.code, path) for finding in found for path in finding.paths}

    def _new(self, code: str, layers: Iterable[Layer]) -> list[Layer]:
        return [layer for layer in layers if (code, layer.path) not in self._reported]

    def _check(self, code: str, observed: list[ObservedLayer]) -> Iterator[Finding]:
        new = self._new(code, [replace(one.layer, vectors=self._vectors(one)) for one in observed])
        if new:
            yield from self._rules[code].check(Measurements(self._model, tuple(new)))

    def _vectors(self, one: ObservedLayer) -> Vectors:
        if one.module in self._sharded:
            return Vectors(running_mean=one.state.mean, running_var=one.state.var)
        return vectors_of(one.module)

    def _updated_twice(self, observed: list[ObservedLayer], model_calls: int) -> Iterator[Finding]:
        forward, backward = Counter[str](), Counter[str]()
        layers: list[Layer] = []
        for one in observed:
            updates = one.record.updates or 0
            again = min(one.observation.backward, updates - one.observation.forward)
            calls = min(model_calls, updates - again)
            if one.record.updates is not None and (again > 0 or calls > 1) and self._new("BN106", [one.layer]):
                backward[one.layer.path], forward[one.layer.path] = again, calls
                layers.append(one.layer)
        if layers:
            size = next((one.record.batch_size for one in observed if one.record.batch_size is not None), 1)
            step = TrainingStep(+forward, +backward, model_calls)
            yield from self._rules["BN106"].check(
                Measurements(self._model, tuple(layers), batch_sizes=(size,), step=step)
            )

    def _evaluated(self, observed: list[ObservedLayer], calls: int) -> Iterator[Finding]:
        """Find an evaluation in training mode: calls without gradients, or updates between the training steps."""
        layers = [one for one in observed if one.layer.by_batch and one.record.updates is not None]
        outside = [self._history[one.layer.path].updated_outside(one) for one in layers]
        for one in layers if calls < 2 else []:
            self._history[one.layer.path].updates_of_steps.add(one.record.updates)
        self._ordinary += calls < 2
        if calls >= 2 and self._ordinary:  # calls in every step belong to the training
            evidence = f"this step calls the model {calls} times in training mode without gradients"
        elif outside and all(updates > max(1, steps) for steps, updates in outside):
            steps, updates = outside[0]
            evidence = f"{counted(updates, 'update')} in addition to those of the last {counted(steps, 'step')}"
        else:
            return
        if new := self._new("BN208", [one.layer for one in layers]):
            yield self._rules["BN208"].finding(
                Severity.WARNING,
                [layer.path for layer in new],
                "the evaluation runs in training mode, without model.eval(): it normalizes by the batch and updates "
                "the running statistics",
                evidence=[evidence],
                confidence="medium",
            )

    def _half_frozen(self, observed: list[ObservedLayer]) -> Iterator[Finding]:
        moved = {one.layer.path for one in observed if one.record.updates != 0}
        layers = tuple(one.layer for one in observed)
        for finding in self._rules["BN107"].check(Measurements(self._model, layers)):
            new = [path for path in finding.paths if path in moved and ("BN107", path) not in self._reported]
            if finding.severity > Severity.NOTE and new:
                yield finding

    def _after_dropout(self, observed: list[ObservedLayer], dropout: Mapping[str, float]) -> Iterator[Finding]:
        new = self._new("BN111", [one.layer for one in observed if one.layer.by_batch])
        yield from self._rules["BN111"].check(Measurements(self._model, tuple(new), dropout=dropout))

    def _dependent(self, observed: list[ObservedLayer], seen: StepObserver) -> Iterator[Finding]:
        """Find batches that are not independent samples, by the inputs of the model."""
        paths = [one.layer.path for one in observed if one.layer.by_batch]
        if not paths or any(code in ("BN105", "BN115") for code, _ in self._reported):
            return
        found = self._inputs.add(seen.features)
        if found is None:
            return
        test, domains = found
        rule = self._rules["BN105" if domains is None else "BN115"]
        inflation = float(test.inflation.mean())
        turns = "" if domains is None else f", and come from {domains.number} domains in turn"
        yield rule.finding(
            Severity.NOTE,
            paths,
            f"the batch means of the inputs vary {inflation:.3g} times as much as those of random batches{turns}",
            evidence=[f"p = {test.p:.2g}; batchnorm.diagnose measures the cost with data and a loss"],
            confidence="medium",
            inflation=inflation,
            p=test.p,
        )

    def _early(self, observed: list[ObservedLayer], step: int, least: float) -> Iterator[Finding]:
        """Find layers whose initial values have more than this weight."""
        if step < _LONG:
            return
        updates = {  # every step since the look made at least one
            one.layer: one.state.updates + step - one.record.step
            for one in observed
            if one.layer.by_batch and one.record.updates and one.layer.momentum and one.state.updates
        }
        shares = {layer: remaining(layer.momentum, number) for layer, number in updates.items()}
        found = self._new("BN217", [layer for layer, share in shares.items() if share > least])
        if found:
            worst = max(found, key=lambda layer: shares[layer])
            needed = math.ceil(math.log(LAGS) / math.log1p(-(worst.momentum or 0.0)))
            yield self._rules["BN217"].finding(
                Severity.WARNING,
                [layer.path for layer in found],
                f"{kept(worst, updates[worst])}; evaluation needs {needed} steps, or recalibration",
                evidence=[layers_listed([layer.path for layer in found])],
                confidence="medium",
                left={layer.path: shares[layer] for layer in found},
            )

    def _not_finite(self, observed: list[ObservedLayer]) -> Iterator[Finding]:
        yield from self._check("BN202", [one for one in observed if not one.state.finite])

    def _dying(self, observed: list[ObservedLayer]) -> Iterator[Finding]:
        """Find channels that died in this run; a residual branch often begins with γ = 0."""
        dying = []
        for one in observed:
            history, dead = self._history[one.layer.path], one.record.dead
            if dead - history.least_dead >= DEAD_SHARE / 2 and dead >= DEAD_SHARE:
                dying.append(one)
            history.least_dead = min(history.least_dead, dead)
        yield from self._check("BN206", dying)

    def _noisy(self, observed: list[ObservedLayer]) -> Iterator[Finding]:
        noise: dict[str, float] = {}
        size = 0.0
        for one in observed:
            history = self._history[one.layer.path].noise
            history.append(one.record.noise)
            samples = one.observation.batch_size
            if not one.layer.by_batch or samples is None or not self._new("BN104", [one.layer]):
                continue
            if len(history) == _LASTING and median(history) >= NOISY:
                noise[one.layer.path] = median(history)
                size = samples_sharing_statistics(one.module, samples)
        if noise:
            worst = sorted(noise, key=lambda path: -noise[path])
            most = noise[worst[0]]
            needed = samples_needed(size, most)
            yield self._rules["BN104"].finding(
                Severity.NOTE,
                worst,
                f"{noise_at(worst[0], size, most)}; {NOISE_AIM}σ takes about {needed}",
                evidence=[f"{named(path)}: {noise[path]:.2g}σ" for path in worst[1:5]],
                confidence="medium",
                batch_size=size,
                noise=noise,
                batch_size_needed=needed,
            )

    def _off(self, observed: list[ObservedLayer], step: int) -> Iterator[Finding]:
        steps_off: dict[Distance, int] = {}
        for one in observed:
            layer, history = one.layer, self._history[one.layer.path]
            distance = _distance(one)
            if not distance.matters:
                history.off_since, history.off_looks = None, 0
                continue
            history.off_since = step if history.off_since is None else history.off_since
            history.off_looks += 1
            since = step - history.off_since
            horizon = _HORIZONS / (layer.momentum or _USUAL_MOMENTUM)
            if history.off_looks >= _LASTING and since >= horizon and layer.by_batch and self._new("BN102", [layer]):
                steps_off[distance] = since
        if not steps_off:
            return
        rule = self._rules["BN102"]
        worst = sorted(steps_off, key=lambda distance: -max(distance.shift, distance.scale))
        paths = [distance.layer.path for distance in worst]
        yield rule.finding(
            Severity.WARNING,
            paths,
            f"{counted(len(worst), 'layer has', 'layers have')} been off for "
            f"{counted(max(steps_off.values()), 'step')}: {listed(paths)}",
            evidence=[f"{distance}, momentum {distance.layer.momentum}" for distance in worst[:5]],
            repair=_repair(rule.repair, worst[0].layer),
            confidence="medium",
            layers={distance.layer.path: {"shift": distance.shift, "scale": distance.scale} for distance in worst},
        )


def _distance(one: ObservedLayer) -> Distance:
    return Distance(one.layer, one.record.mean_distance, abs(one.record.log_ratio) / 2)


def _repair(after_training: str, layer: Layer) -> str:
    """Return the doctor's fix for the current weights, after a fix for the rest of the training if it needs one."""
    if layer.momentum:
        return after_training
    problem = "average never forgets" if layer.momentum is None else "average is never updated"
    return (
        "for found in batchnorm.walk.norm_layers(model):\n"
        f"    found.module.momentum = {_USUAL_MOMENTUM}  # with {layer.momentum} the {problem}\n"
        f"{after_training}  # when training has ended"
    )
