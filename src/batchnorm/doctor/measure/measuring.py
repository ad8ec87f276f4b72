"""Fill in the measurements of a model, from the model itself, its trace, passes over the data, and a training step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from batchnorm.doctor.finding import Severity
from batchnorm.doctor.measure.cause import Misfit, averaging_of, cause_of, suspects
from batchnorm.doctor.measure.distance import different_calls, distance_of
from batchnorm.doctor.measure.domains import domains_of
from batchnorm.doctor.measure.effect import Effect, effect_of
from batchnorm.doctor.measure.evaluation_mode import Evaluate, evaluated_in_training, left_in_training
from batchnorm.doctor.measure.independence import independence_of
from batchnorm.doctor.measure.layers import Layer, layers_of
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.padding import padding_effect
from batchnorm.doctor.measure.passes import Passes
from batchnorm.doctor.measure.processes import ProcessStates, number_of_processes
from batchnorm.doctor.measure.runs import Runs
from batchnorm.doctor.measure.traced import dropout_before
from batchnorm.doctor.measure.training_step import StepError, TrainingStep, training_step
from batchnorm.doctor.wording import samples_as_code
from batchnorm.models.data.batches import Batches, device_of, own_copy
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.execution.observe import Statistics
from batchnorm.models.execution.processes import Processes
from batchnorm.models.execution.recording import fewer_samples
from batchnorm.models.graphs.lowering import lower
from batchnorm.models.graphs.model_graph import trace
from batchnorm.models.graphs.neighbours import batch_norm_calls
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.walk import set_mode

# Number of samples that the model is traced with.
_TRACED = 2
# Largest number of samples for the test of independence; more take time and add nothing.
_TESTED = 2048
# Smallest change of a deviation by dropout that rounding and chance do not explain.
_DROPOUT = 0.1


def measure_model(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Measurements:
    """Measure the properties that the model itself shows."""
    missing = {"data": "needs data (data=)", "step": "needs data (data=)"}
    if optimizer is None:
        missing["optimizer"] = "needs the optimizer (optimizer=)"
    trains = any(p.requires_grad for p in model.parameters())
    return Measurements(model, layers_of(model), model.training, trains, optimizer, missing)


def add_modes(m: Measurements, evaluate: Evaluate | None) -> Measurements:
    """Find the layers that run in training mode when the model is evaluated."""
    evaluated = () if evaluate is None else evaluated_in_training(m.model, m.layers, evaluate)
    return replace(m, left_in_training=left_in_training(m.model, m.layers), evaluated_in_training=evaluated)


def add_processes(m: Measurements, processes: Processes | None) -> Measurements:
    """Compare the processes, each of which must call this; with None, only count them."""
    if processes is not None:
        return replace(m, processes=processes.count, process_states=ProcessStates.gather(m.layers, processes))
    count = number_of_processes()
    if count > 1:
        m = lacking(m, "ranks", "needs the other processes (process_group= on each of them)")
    return replace(m, processes=count)


def add_trace(m: Measurements, example: Inputs | None) -> Measurements:
    """Trace the model, whose modules are all in evaluation, to find the place of each layer."""
    if example is None:
        called = "a model that is called by its forward" if m.batch_sizes else "data (data=)"
        return lacking(m, "trace", f"needs {called}, to see the arguments of the model")
    dropout: dict[nn.Module, float] = {}

    def prepare(module: fx.GraphModule) -> fx.GraphModule:
        dropout.update(dropout_before(module, {layer.module for layer in m.layers}))  # lowering removes dropout
        return lower(module)

    try:
        few, result = fewer_samples(m.model, example, _TRACED)
        traced = trace(m.model, few, expected=result, prepare=prepare)
    except Untraceable as error:
        return replace(lacking(m, "trace", f"needs to trace the model, which failed: {error}"), dropout=dropout)
    calls = {call.path: call for call in reversed(batch_norm_calls(traced))}
    layers = tuple(
        replace(layer, place=next((calls[path] for path in layer.found.paths if path in calls), None))
        for layer in m.layers
    )
    return replace(m, layers=layers, trace=traced, dropout=dropout)


def add_data(m: Measurements, passes: Passes, batches: Batches) -> Measurements:
    """Pass the data through the model three times, and make a training step."""
    training = {module: module.training for module in m.model.modules()}
    set_mode(m.model, training=False)
    passes.first(batches)
    m = replace(add_passes(m, passes), dataset=samples_as_code(batches.data, passes.kept[0]))
    for module, mode in training.items():
        module.training = mode
    m = _add_step(m, passes)
    set_mode(m.model, training=False)
    return m


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
        m = lacking(m, "output", "the model returns no floating-point tensor to compare")
    elif not (passes.by_batch.finite and passes.by_running.finite):
        m = lacking(m, "output", "the model's output or loss is not finite on these data")
    elif passes.by_batch.shapes != passes.by_running.shapes:
        m = lacking(m, "output", "the model's output has another shape in each pass")
    else:
        passes.by_population = passes.again(population_of(passes.layers), "population statistics")
    if passes.budget < 1:
        m = lacking(m, "pass", "needs one more pass over the data (budget=1)")
    return m


def _add_step(m: Measurements, passes: Passes) -> Measurements:
    if not m.trains:
        return lacking(m, "step", "no parameter requires a gradient, so there is no training step")
    try:
        batch = own_copy(passes.kept[0], device_of(m.model))
        return replace(m, step=training_step(m.model, m.layers, passes.call, batch))
    except StepError as error:
        return lacking(m, "step", f"needs a training step, and {error}")


def add_effects(m: Measurements, passes: Runs) -> Measurements:
    """Compare the passes, and make further ones for single layers within the budget.

    The passes that most rules need come first. The rest of the budget ranks the layers of BN101.
    """
    distances = tuple(d for layer in m.measured if (d := distance_of(layer, m.samples, m.batch_size)) is not None)
    noise = {
        layer.path: float(layer.samples.noise(m.batch_size, layer.eps).median())
        for layer in m.measured
        if layer.samples is not None and layer.by_batch
    }
    values, batch = _values_of_samples(m.measured)
    independence = independence_of(torch.cat(list(values.values()), 1), batch) if values else None
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
        padding=padding_effect(passes),
    )
    m = replace(m, misfit=_misfit(m), pooled_calls=_pooled_calls(m, passes))
    m = replace(m, reshuffled=_reshuffled(m, passes))
    return replace(m, left_by_layer=_left_by_layer(m, passes))


def _dropout_scale(layers: Iterable[Layer], step: TrainingStep | None) -> dict[str, float]:
    found = {}
    for layer in layers:
        with_dropout = None if step is None else step.inputs.get(layer.path)
        without = layer.first_input
        if with_dropout is None or without is None or with_dropout.count != without.count:
            continue
        ratio = (with_dropout.var.cpu() + layer.eps) / (without.var.cpu() + layer.eps)
        scale = float(ratio.median().sqrt())
        if abs(scale - 1) > _DROPOUT:
            found[layer.path] = scale
    return found


def _values_of_samples(layers: list[Layer]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean of each sample over its positions `[samples, channels]` by layer, and each sample's batch."""
    samples = {layer.path: layer.samples for layer in layers if layer.samples is not None}
    batch = torch.tensor(next((of.batch for of in samples.values()), []), device="cpu")
    kept = {path: torch.cat(of.kept) for path, of in samples.items()}
    values = {
        path: of_layer[:_TESTED].double().nan_to_num(0.0, 0.0, 0.0)
        for path, of_layer in kept.items()
        if len(of_layer) == len(batch)
    }
    return values if len(batch.unique()) > 1 else {}, batch[:_TESTED]


def _misfit(m: Measurements) -> Misfit | None:
    effect = m.running_effect
    off = () if effect is None else suspects(m.distances, effect, m.gap)
    if effect is None or not off:
        return None
    cause = cause_of(off, m.distances, m.trace, m.dropout_scale, averaging_of(m.model))
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


def lacking(m: Measurements, need: str, reason: str) -> Measurements:
    """Note that a need of rules is not met."""
    return replace(m, missing={**m.missing, need: reason})
