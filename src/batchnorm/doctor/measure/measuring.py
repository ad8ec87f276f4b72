"""Fill in the measurements that passes over the data give, in any framework."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.cause import Misfit, cause_of, suspects
from batchnorm.doctor.measure.distance import different_calls, distance_of
from batchnorm.doctor.measure.domains import domains_of
from batchnorm.doctor.measure.effect import Effect, effect_of
from batchnorm.doctor.measure.independence import independence_of
from batchnorm.doctor.measure.layers import Array, Layer, Statistics, median
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.runs import Runs
from batchnorm.doctor.measure.training_step import TrainingStep

# Largest number of samples for the test of independence; more take time and add nothing.
_TESTED = 2048
# Smallest change of a deviation by dropout that rounding and chance do not explain.
_DROPOUT = 0.1


def add_passes(m: Measurements, passes: Runs) -> Measurements:
    """Add the results of the first two passes, and make the third, normalized by the population."""
    if not sum(passes.sizes):
        raise ValueError("diagnose expects at least one batch, got empty data. Pass more data.")
    measured = iter(passes.layers)
    m = replace(
        m,
        layers=tuple(layer if layer.running is None else next(measured) for layer in m.layers),
        samples=sum(passes.sizes),
        batch_sizes=tuple(passes.sizes),
        loss=bool(passes.by_running.losses),
        loss_source=passes.loss_source,
        missing={need: reason for need, reason in m.missing.items() if need not in ("data", "step")},
    )
    if not passes.by_running.outputs:
        m = m.lacking("output", "the model returns no floating-point tensor to compare")
    elif not (passes.by_batch.finite and passes.by_running.finite):
        m = m.lacking("output", "the model's output or loss is not finite on these data")
    elif passes.by_batch.shapes != passes.by_running.shapes:
        m = m.lacking("output", "the model's output has another shape in each pass")
    else:
        passes.by_population = passes.again(population_of(passes.layers), "population statistics")
    if passes.budget < 1:
        m = m.lacking("pass", "needs one more pass over the data (budget=1)")
    return m


def add_effects(m: Measurements, passes: Runs) -> Measurements:
    """Compare the passes, and make further ones for single layers within the budget.

    The passes that most rules need come first. The rest of the budget ranks the layers of BN101.
    """
    distances = tuple(d for layer in m.measured if (d := distance_of(layer, m.samples, m.batch_size)) is not None)
    noise = {
        layer.path: median(layer.samples.noise(m.batch_size, layer.eps))
        for layer in m.measured
        if layer.samples is not None and layer.by_batch
    }
    values, batch = _values_of_samples(m.measured)
    independence = independence_of(np.concatenate(list(values.values()), 1), batch) if values else None
    m = replace(
        m,
        gap=effect_of(passes.by_running, passes.by_batch),
        training_mode_effect=effect_of(passes.by_batch, passes.by_running),
        running_effect=effect_of(passes.by_running, passes.by_population),
        batch_effect=effect_of(passes.by_batch, passes.by_population),
        distances=distances,
        noise={path: value for path, value in noise.items() if math.isfinite(value)},
        dropout_scale=_dropout_scale(m.layers, m.step),
        independence=independence,
        domains=domains_of(values, batch) if independence is not None and independence.rejected else None,
        padding=passes.padding(),
    )
    m = replace(m, misfit=_misfit(m), pooled_calls=_pooled_calls(m, passes))
    m = replace(m, reshuffled=_reshuffled(m, passes))
    return replace(m, left_by_layer=_left_by_layer(m, passes))


@np.errstate(all="ignore")
def _dropout_scale(layers: Iterable[Layer], step: TrainingStep | None) -> dict[str, float]:
    found = {}
    for layer in layers:
        with_dropout = None if step is None else step.inputs.get(layer.path)
        without = layer.first_input
        if with_dropout is None or without is None or with_dropout.count != without.count:
            continue
        ratio = (with_dropout.var + layer.eps) / (without.var + layer.eps)
        scale = math.sqrt(median(ratio))
        if abs(scale - 1) > _DROPOUT:
            found[layer.path] = scale
    return found


def _values_of_samples(layers: list[Layer]) -> tuple[dict[str, Array], NDArray[np.integer]]:
    """Return the mean of each sample over its positions `[samples, channels]` by layer, and each sample's batch."""
    samples = {layer.path: layer.samples for layer in layers if layer.samples is not None}
    batch = np.array(next((of.batch for of in samples.values()), []), int)
    kept = {path: np.concatenate(of.kept) for path, of in samples.items()}
    values = {
        path: np.nan_to_num(of_layer[:_TESTED].astype(np.float64), posinf=0.0, neginf=0.0)
        for path, of_layer in kept.items()
        if len(of_layer) == len(batch)
    }
    return values if len(np.unique(batch)) > 1 else {}, batch[:_TESTED]


def _misfit(m: Measurements) -> Misfit | None:
    effect = m.running_effect
    off = () if effect is None else suspects(m.distances, effect, m.gap)
    if effect is None or not off:
        return None
    cause = cause_of(off, m.distances, m.dropout_scale, m.averaged)
    return Misfit(off, len(m.distances), effect, cause)


def _pooled_calls(m: Measurements, passes: Runs) -> dict[str, Effect]:
    found = {}
    model_calls = 1 if m.step is None else m.step.model_calls
    for number, layer in enumerate(m.measured):
        if len(layer.calls) <= max(1, model_calls) or not different_calls(layer):
            continue
        each: dict[int, Statistics | tuple[Statistics, ...]] = dict(population_of(m.measured))
        each[number] = tuple(Statistics(moments.mean[None], moments.var_unbiased[None]) for moments in layer.calls)
        if passes.by_population is not None and passes.spend():
            found[layer.path] = effect_of(passes.by_population, passes.again(each, "statistics for each call"))
    return {path: effect for path, effect in found.items() if effect is not None}


def _reshuffled(m: Measurements, passes: Runs) -> Effect | None:
    """Reshuffle the batches if evaluation is worse than training, and stale statistics do not explain that."""
    if m.gap is None or m.gap.severity == Severity.NOTE or not any(layer.by_batch for layer in m.measured):
        return None
    # The noise of other batches changes independent samples, too. Only a loss distinguishes noise from knowledge.
    stale = m.running_effect is None or m.running_effect.severity > Severity.NOTE
    if (not m.dependent and (stale or m.gap.loss is None)) or not passes.spend():
        return None
    return effect_of(passes.reshuffled(), passes.by_batch)


def _left_by_layer(m: Measurements, passes: Runs) -> dict[str, Effect]:
    if m.misfit is None or not m.gap_matters:
        return {}
    population = population_of(m.measured)
    found = {}
    for layer in (distance.layer for distance in m.misfit.distances):
        if passes.spend():
            number = m.measured.index(layer)
            outcome = passes.again({number: population[number]}, "one layer's statistics")
            found[layer.path] = effect_of(outcome, passes.by_population)
    return {path: effect for path, effect in found.items() if effect is not None}


def population_of(layers: Iterable[Layer]) -> dict[int, Statistics]:
    """Return the statistics of the population, by the number of the layer."""
    found = {}
    for number, layer in enumerate(layers):
        population = layer.population
        if population is not None and layer.running is not None and len(layer.running.mean) == 1:
            found[number] = Statistics(population.mean[None], population.var_unbiased[None])
    return found
