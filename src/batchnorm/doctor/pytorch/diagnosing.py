"""The diagnosis, as users call it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchnorm._options import check_max_samples
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.doctor.applying import apply_rules, layers_left_out
from batchnorm.doctor.measure.measurements import Measurements
from batchnorm.doctor.measure.measuring import add_effects
from batchnorm.doctor.pytorch.continued import add_lag
from batchnorm.doctor.pytorch.evaluation_mode import Evaluate
from batchnorm.doctor.pytorch.inspection import check_model, guessed_inputs
from batchnorm.doctor.pytorch.layers import optimized_by
from batchnorm.doctor.pytorch.measuring import (
    Modules,
    add_data,
    add_modes,
    add_processes,
    add_trace,
    measure_model,
    modules_of,
)
from batchnorm.doctor.pytorch.passes import Forward, Loss, ModelCall, Passes
from batchnorm.doctor.report.diagnosis import Diagnosis
from batchnorm.doctor.rules import load_rules
from batchnorm.models.data.batches import Batches, check_data
from batchnorm.models.execution.calling import DefaultForward, eager
from batchnorm.models.execution.processes import Processes
from batchnorm.models.execution.progress import bar
from batchnorm.walk import restored, set_mode


def diagnose(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    evaluate: Evaluate | None = None,
    max_samples: int | None = 1000,
    budget: int = 5,
    process_group: Any = None,
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with the batch normalization of a model, with evidence and a fix.

    The model and the data are only read: parameters, modes, buffers, gradients, hooks and the random state stay
    unchanged, bit for bit, also after an exception. With data, the model runs over them three times: normalized by the
    batches, by the running statistics, and by the statistics of the whole population. One batch goes through a training
    step with its backward pass. Dropout and other modules are in training mode in that step only.

    Args:
        model: The network. In training mode it is examined as it is; in evaluation mode, as `train()` sets it.
        data: An iterable of the batches that the model is trained on: tensors, tuples of inputs and targets, or dicts.
            Without data, only the model itself is examined.
        loss: `loss(output, target)`. The target is the last part of a tuple, or the whole batch if it is not a tuple. A
            loss of torch gets the `logits` of the output, and of a dict the entry `labels`, `label`, `targets`,
            `target` or `y`. By default, the loss that the model computes: the `loss` of its output, as in transformers,
            or the result of a Lightning module's `training_step`. Without any loss, costs are changes of the output,
            and an effect is at most a warning.
        optimizer: The optimizer that trains the model. If the weights seem to have changed after the running
            statistics, a copy of both makes a few training steps, to see whether the learning rate explains this
            (BN102).
        forward: `forward(model, batch)` calls the model and returns its output. By default, the model gets a tensor
            itself; as many leading parts of a tuple as its `forward` has required arguments; and the entries of a dict
            whose keys are names of its arguments. A Lightning module is called by its `training_step`, or by
            `validation_step` if it optimizes manually; what the step logs is dropped. If a step needs a trainer, the
            module is called by its `forward`.
        evaluate: `evaluate(model)` is your evaluation. It is run once, after `model.train()`, to see whether it calls
            `model.eval()`; what it returns is not used.
        max_samples: Stop after the batch that reaches this many samples; None reads all the data.
        budget: Number of further passes over the data to measure the cost of single layers.
        process_group: Compare the processes of this group; each of them must call `diagnose`. With None, there is no
            communication.
        progress: Whether to show the expected time and a bar on standard error (needs rich).

    Returns:
        The diagnosis: the findings, worst first and causes before what they explain, and the rules that could not be
        checked. It prints as a report.

    Raises:
        TypeError: model is not a module, data is not an iterable of batches, or a batch does not fit the model's
            `forward`.
        ValueError: the model has no batch normalization, or lazy layers before their first batch; its parameters are
            sharded (FSDP, tensor parallel); the optimizer has no parameter of the model; an argument is out of range;
            data are empty.
        ImportError: progress without rich.
        RuntimeError: with process_group, another process failed.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> diagnosis = diagnose(model, [torch.randn(8, 3, 16, 16) for _ in range(4)])
        >>> [finding.code for finding in diagnosis.findings if finding.code == "BN110"]
        ['BN110']
    """
    together = process_group is not None
    with Processes("diagnose", process_group, synchronize=together) as processes:
        _check(model, data, optimizer, max_samples, budget)
        inner = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
        kept = nn.ModuleList([model, loss] if isinstance(loss, nn.Module) else [model])
        with restored(kept, buffers=True), bar("diagnose", progress, processes.check) as shown, eager():
            modules = modules_of(inner)
            measurements = add_modes(measure_model(inner, optimizer), inner, modules, evaluate)
            measurements = add_processes(measurements, processes if together else None)
            call = ModelCall(forward or DefaultForward("diagnose", for_loss=loss is None), loss)
            passes = Passes(inner, measurements.measured, call, budget, shown)
            batches = None if data is None else Batches(data, max_samples)
            modes = [module.training for module in inner.modules()]
            measurements = _measure(measurements, inner, modules, passes, batches)
            measurements = add_lag(measurements, inner, optimizer, passes, modes)
            findings, not_checked = apply_rules(measurements, load_rules())
        return Diagnosis.of(measurements, findings, not_checked + layers_left_out(measurements))


def _measure(
    m: Measurements, model: nn.Module, modules: Modules, passes: Passes, batches: Batches | None
) -> Measurements:
    if batches is not None:
        m = add_data(m, model, modules, passes, batches)
    set_mode(model, training=False)
    m = add_trace(m, model, modules, passes.example or guessed_inputs(model))
    return m if batches is None else add_effects(m, passes)


def _check(
    model: nn.Module, data: Any, optimizer: torch.optim.Optimizer | None, max_samples: int | None, budget: int
) -> None:
    check_model("diagnose", model)
    check_not_sharded("diagnose", model)
    if data is not None:
        check_data("diagnose", data)
    check_max_samples("diagnose", max_samples)
    optimized = optimized_by(optimizer)
    if optimized is not None and optimized.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"diagnose expects an optimizer of the model's parameters, got {type(optimizer).__name__} with none of "
            "them. A copy, such as one with averaged weights, has parameters of its own: leave optimizer= out."
        )
    if budget < 0:
        raise ValueError(f"diagnose expects budget >= 0, got {budget}. 0 makes no pass for single layers.")
