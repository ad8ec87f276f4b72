"""Measure a model of PyTorch: the model itself, its trace, passes over the data, and a training step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import fx, nn
from torch.optim.swa_utils import AveragedModel

from batchnorm.doctor.measure.cause import averaging_by_name
from batchnorm.doctor.measure.layers import Layer
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.measuring import add_passes
from batchnorm.doctor.measure.processes import ProcessStates
from batchnorm.doctor.pytorch.evaluation_mode import Evaluate, evaluated_in_training, left_in_training
from batchnorm.doctor.pytorch.layers import layers_of, optimized_by, settings_of, vectors_of
from batchnorm.doctor.pytorch.passes import Passes
from batchnorm.doctor.pytorch.traced import dropout_before, place_of
from batchnorm.doctor.pytorch.training_step import StepError, training_step
from batchnorm.doctor.wording import EXAMPLE, counted, example_as_code, samples_as_code
from batchnorm.models.data.batches import Batches, device_of, own_copy
from batchnorm.models.data.inputs import Inputs
from batchnorm.models.execution.processes import Processes
from batchnorm.models.execution.recording import fewer_samples
from batchnorm.models.graphs.lowering import lower
from batchnorm.models.graphs.model_graph import trace
from batchnorm.models.graphs.neighbours import batch_norm_calls
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.walk import norm_layers, set_mode

Modules = Mapping[str, nn.Module]  # by the layer's path

# Number of samples that the model is traced with.
_TRACED = 2


def modules_of(model: nn.Module) -> Modules:
    """Return the modules of all layers of batch normalization, in the model's order."""
    return {found.path: found.module for found in norm_layers(model)}


def measure_model(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Measurements:
    """Measure the properties that the model itself shows."""
    missing = {"data": "needs data (data=)", "step": "needs data (data=)"}
    if optimizer is None:
        missing["optimizer"] = "needs the optimizer (optimizer=)"
    optimized, decay, modules = optimized_by(optimizer), _weight_decay(optimizer), modules_of(model)

    def decay_of(module: nn.Module) -> float:
        return max((decay.get(id(p), 0.0) for p in module.parameters(recurse=False)), default=0.0)

    layers = tuple(
        replace(
            layer,
            vectors=vectors_of(module),
            weight_decay=decay_of(module),
            **settings_of(module, optimized),
        )
        for layer, module in zip(layers_of(model), modules.values(), strict=True)
    )
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return Measurements(
        type(model).__name__,
        layers,
        model.training,
        trains=any(p.requires_grad for p in model.parameters()),
        device=", ".join(sorted({str(t.device) for t in tensors})),
        dtype=", ".join(sorted(dtypes)),
        versions={"torch": str(torch.__version__)},
        averaged=_averaging_of(model),
        optimizer_code=None if optimizer is None else _as_code(optimizer, max(layer.weight_decay for layer in layers)),
        missing=missing,
    )


def _averaging_of(model: nn.Module) -> str:
    """Return why the weights of a model are known to be averages; empty if they are not known to be."""
    name = type(model).__name__
    if isinstance(model, AveragedModel):
        return f"{name} holds the average of {counted(int(model.n_averaged), 'model')}" if model.n_averaged > 1 else ""
    return averaging_by_name(name)


def _weight_decay(optimizer: torch.optim.Optimizer | None) -> dict[int, float]:
    """Return the weight decay of each parameter, by its id."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(p): float(group.get("weight_decay", 0.0)) for group in groups for p in group["params"]}


def _as_code(optimizer: torch.optim.Optimizer, rate: float) -> str:
    """Return code that makes the same optimizer, without weight decay of batch normalization; empty if it has none."""
    if not rate:
        return ""
    kind = type(optimizer)
    known = getattr(torch.optim, kind.__name__, None) is kind
    name = f"torch.optim.{kind.__name__}" if known else kind.__name__
    imported = "" if known else f"from {kind.__module__} import {kind.__name__}\n"
    defaults = inspect.signature(kind).parameters
    chosen = {key: value for key, value in optimizer.defaults.items() if key in defaults and key != "weight_decay"}
    options = "".join(f", {key}={value!r}" for key, value in chosen.items() if value != defaults[key].default)
    return f"{imported}optimizer = {name}(batchnorm.parameter_groups(model, weight_decay={rate:g}){options})"


def add_modes(m: Measurements, model: nn.Module, modules: Modules, evaluate: Evaluate | None) -> Measurements:
    """Find the layers that run in training mode when the model is evaluated."""
    by_batch = {layer.path: modules[layer.path] for layer in m.layers if layer.by_batch}
    evaluated = () if evaluate is None else evaluated_in_training(model, by_batch, evaluate)
    return replace(m, left_in_training=left_in_training(model, by_batch), evaluated_in_training=evaluated)


def add_processes(m: Measurements, processes: Processes | None) -> Measurements:
    """Compare the processes, each of which must call this; with None, only count them."""
    if processes is not None:
        own = {layer.path: {k: v for k, v in vars(layer.vectors).items() if v is not None} for layer in m.layers}
        return replace(m, processes=processes.count, process_states=ProcessStates(tuple(processes.gather(own))))
    count = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if count > 1:
        m = m.lacking("ranks", "needs the other processes (process_group= on each of them)")
    return replace(m, processes=count)


def add_trace(m: Measurements, model: nn.Module, modules: Modules, example: Inputs | None) -> Measurements:
    """Trace the model, whose modules are all in evaluation, to find the place of each layer."""
    if example is None:
        called = "a model that is called by its forward" if m.batch_sizes else "data (data=)"
        return m.lacking("trace", f"needs {called}, to see the arguments of the model")
    dropout: dict[nn.Module, float] = {}

    def prepare(module: fx.GraphModule) -> fx.GraphModule:
        dropout.update(dropout_before(module, set(modules.values())))  # lowering removes dropout
        return lower(module)

    try:
        few, result = fewer_samples(model, example, _TRACED)
        traced = trace(model, few, expected=result, prepare=prepare)
    except Untraceable as error:
        m = m.lacking("trace", f"needs to trace the model, which failed: {error}")
        return replace(m, dropout=_by_path(dropout, modules))
    calls = {call.path: call for call in reversed(batch_norm_calls(traced))}

    def placed(layer: Layer) -> Layer:
        call = next((calls[path] for path in layer.paths if path in calls), None)
        if call is None:
            return layer
        return replace(layer, place=place_of(call, traced, modules[layer.path], layer.by_batch))

    return replace(
        m,
        layers=tuple(map(placed, m.layers)),
        dropout=_by_path(dropout, modules),
        example=_example(traced.sizes[0]),
    )


def _by_path(dropout: Mapping[nn.Module, float], modules: Modules) -> dict[str, float]:
    return {path: dropout[module] for path, module in modules.items() if module in dropout}


def _example(inputs: Inputs) -> str:
    both = inputs.args and inputs.kwargs
    return EXAMPLE if both else example_as_code(inputs.args or inputs.kwargs.values(), inputs.kwargs)


def add_data(m: Measurements, model: nn.Module, modules: Modules, passes: Passes, batches: Batches) -> Measurements:
    """Pass the data through the model three times, and make a training step."""
    training = {module: module.training for module in model.modules()}
    set_mode(model, training=False)
    passes.first(batches)
    m = replace(add_passes(m, passes), dataset=samples_as_code(batches.data, passes.kept[0]))
    for module, mode in training.items():
        module.training = mode
    m = _add_step(m, model, modules, passes)
    set_mode(model, training=False)
    return m


def _add_step(m: Measurements, model: nn.Module, modules: Modules, passes: Passes) -> Measurements:
    if not m.trains:
        return m.lacking("step", "no parameter requires a gradient, so there is no training step")
    try:
        batch = own_copy(passes.kept[0], device_of(model))
        return replace(m, step=training_step(model, modules, passes.call, batch))
    except StepError as error:
        return m.lacking("step", f"needs a training step, and {error}")
