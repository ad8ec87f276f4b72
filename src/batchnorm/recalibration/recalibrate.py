"""The function `recalibrate`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm import _checks, _options
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.models.data.batches import Forward, MaskOf, ThreadSettings, check_data, device_of
from batchnorm.models.description import describe
from batchnorm.models.execution.calling import DefaultForward, eager
from batchnorm.models.execution.observe import (
    Observer,
    Rows,
    Statistics,
    empty_moments,
    merged,
    running_buffer,
    running_statistics,
)
from batchnorm.models.execution.processes import Processes
from batchnorm.models.execution.progress import bar
from batchnorm.models.report import Change, LayerStatistics, Recalibration, Result
from batchnorm.models.selection import Selection, select
from batchnorm.recalibration.passes import Measured, Run, sequential, single
from batchnorm.recalibration.rereading import RepeatableBatches
from batchnorm.undo import UndoOnFailure, overwrite, restorer
from batchnorm.walk import Found, check_has_values, copied, is_frozen, norm_layers, restored, set_mode

_CALLER = "recalibrate"


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    only: Selection | None = None,
    passes: str = "single",
    prior: float = 0.0,
    forward: Forward | None = None,
    mask: MaskOf | None = None,
    shared: str = "pool",
    max_samples: int | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    cache_bytes: int = 2**30,
    process_group: Any = None,
    synchronize: bool = True,
    progress: bool = False,
    inplace: bool = False,
) -> Result[Recalibration]:
    """Set the running statistics of a trained model to the population statistics of `data`.

    `running_mean` becomes the mean of all values that reach a layer, and `running_var` their unbiased variance,
    M2/(m - 1). Deviations within and between batches both count, so the result does not depend on the batch size. Use
    this function for weights that were averaged (EMA, SWA), fine-tuned, pruned or quantized, for running averages that
    lag behind, and for data of another domain (AdaBN).

    Nothing else in the model changes. All other layers, such as dropout, are in evaluation mode during the passes.
    Modes, hooks, momentum, other buffers and the random state are restored, also after an exception. With
    `momentum=None`, `num_batches_tracked` becomes the number of batches, so that the average continues correctly;
    otherwise, it does not change.

    Args:
        model: Any module. For `DistributedDataParallel`, the wrapped module is recalibrated.
        data: An iterable of batches: tensors, tuples, lists, dicts, or anything that `forward` accepts. With several
            ranks, this rank's share, which may have any length, even zero. `passes="sequential"` may read it more than
            once.
        only: The layers to recalibrate: a pattern for paths such as `"backbone.*"`, several patterns, a class, or a
            predicate of path and layer. By default, all layers with running statistics except frozen ones. Frozen
            layers are `FrozenBatchNorm` and, in a model in training mode, layers in evaluation mode.
        passes: "single" makes one pass, and normalizes each batch by its own statistics, as in training.
            "sequential" goes layer by layer from the input. Each layer gets the output of the recalibrated layers
            before it, as in evaluation.
        prior: The weight of the former statistics, as a number of samples. Mean and variance both become
            `running ← (prior·former + n·measured)/(prior + n)`, with n samples of data. 0 discards the former ones.
        forward: `forward(model, batch)` calls the model. By default, a tensor is the model's argument. From a tuple,
            the model gets as many of the first items as its `forward` requires arguments, so that labels are left out.
            From a dict, it gets the keys that are arguments of its `forward`.
        mask: `mask(batch)` returns the values that count, as booleans or weights: of shape `[N]`, `[N, *S]` or
            flattened like the layer's input, or a dict of these by layer path. It does not apply to layers that the
            model calls with `mask=`.
        shared: "pool" gives a module that is used in several places the statistics of all places. "separate" creates a
            module for each place; these modules share weight and bias.
        max_samples: Stop after the batch that reaches this number of samples (of this rank).
        device: The device that batches are moved to; by default the model's, if it is on one device.
        autocast: bfloat16 or float16 for `torch.autocast`; by default the active setting.
        cache_bytes: With "sequential", the limit on the bytes of tensors in forward passes that wait between layers.
            Other batches are computed again for every layer. With 0, no passes wait. On the CPU, the process can grow
            by two to three times this size, because each waiting pass is a thread, which does not return freed memory.
        process_group: The ranks that pool their statistics; None for all, if `torch.distributed` is initialized.
        synchronize: Whether to communicate with other ranks.
        progress: Whether to show a progress bar on standard error (needs rich).
        inplace: Whether to change the model itself instead of a copy. If anything fails, it does not change.

    Returns:
        The model, and a `Recalibration`: the change of each layer, and the moments of every layer and call.

    Raises:
        TypeError: data is not an iterable of batches, or a batch does not fit the model's `forward`.
        ValueError: an argument is out of range; no layer is selected or reached; a layer gets values that are not
            finite, or only one per channel; data is empty; the model is sharded (FSDP, tensor parallel) and `inplace`
            is False, `passes` is "sequential", or the ranks have different numbers of batches.
        RuntimeError: another rank failed; every rank's model is unchanged.

    Numerics: moments are float64. The statistics equal two-pass float64, rounded once to the buffers' dtype.

    Source: Wu & Johnson 2021, Rethinking "Batch" in BatchNorm (population statistics); Li et al. 2016, Revisiting
        Batch Normalization for Practical Domain Adaptation (AdaBN); Schneider et al. 2020, Improving robustness
        against common corruptions by covariate shift adaptation, equation 3 (`prior`).

    Examples:
        >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> batches = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [10.0]])]
        >>> model, report = recalibrate(model, batches)
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (4.0, 12.5)
        >>> report["0"].moments[0].count.item()
        5.0
    """
    with UndoOnFailure() as undo, Processes(_CALLER, process_group, synchronize=synchronize) as processes:
        _check_arguments(model, passes, prior, shared, max_samples, cache_bytes)
        check_data(_CALLER, data)
        if isinstance(only, Iterator):
            only = list(only)  # it is read twice
        if not inplace or passes == "sequential" or shared == "separate":
            check_not_sharded(_CALLER, model)
        if not inplace:
            _select(model, only)  # fail before anything is copied
            with torch.inference_mode(False):  # a copy made in inference mode could not be trained
                model = copied(_CALLER, model)
        if shared == "separate":
            _separate(model, undo)
        selected, left = _select(model, only)
        before = [running_statistics(found.module) for found in selected]
        _check_same(processes, [found.paths for found in selected], passes=passes, prior=prior, shared=shared)

        def new_statistics(number: int, rows: Rows, samples: int) -> Statistics:
            return _new_statistics(selected[number], before[number], rows, samples, prior)

        inner = _unwrapped(model)
        target = torch.device(device) if device is not None else device_of(model)
        with restored(model, buffers=True), bar(_CALLER, progress, processes.check) as shown, eager():
            set_mode(model, training=False)
            observer = Observer(_CALLER, selected)
            observer.install()
            run = Run(
                inner, observer, RepeatableBatches(data, max_samples), forward or DefaultForward(_CALLER), mask,
                target, ThreadSettings(autocast, target), shown,
            )  # fmt: skip
            measured = (
                single(run, processes)
                if passes == "single"
                else sequential(run, processes, new_statistics, cache_bytes)
            )
        report = _report(selected, left, before, measured, new_statistics, passes, processes.count)
        measured_at = {layer.path: Statistics(layer.mean, layer.var) for layer in report.layers}
        for found in selected:
            if found.path in measured_at:
                _write(found, measured_at[found.path], measured.batches, undo)
        processes.end()
        return Result(model, report)


def _check_arguments(
    model: nn.Module, passes: str, prior: float, shared: str, max_samples: int | None, cache_bytes: int
) -> None:
    _checks.check_module(_CALLER, model)
    check_has_values(_CALLER, model)
    _options.check_choice(_CALLER, "passes", passes, ("single", "sequential"))
    _options.check_choice(_CALLER, "shared", shared, ("pool", "separate"))
    _options.check_prior(_CALLER, prior)
    _options.check_max_samples(_CALLER, max_samples)
    if cache_bytes < 0:
        raise ValueError(f"{_CALLER} expects cache_bytes >= 0, got {cache_bytes}. 0 keeps nothing between layers.")


def _separate(model: nn.Module, undo: UndoOnFailure) -> None:
    """Replace a shared module by a separate module in each place, with the same parameters and separate statistics."""
    for found in norm_layers(model):
        for parent, key in found.slots[1:]:
            own = copy.copy(found.module)
            for name, value in vars(own).items():
                if isinstance(value, dict):  # parameters, buffers or hooks
                    vars(own)[name] = value.copy()
            own._buffers.update({n: None if b is None else b.clone() for n, b in own._buffers.items()})
            undo.before(parent._modules.__setitem__, key, found.module)
            parent._modules[key] = own


def _select(model: nn.Module, only: Selection | None) -> tuple[list[Found], list[Change]]:
    """Return the layers to recalibrate, and the others with reasons."""
    every = norm_layers(model)
    chosen = select(_CALLER, every, only)
    selected, left = [], []
    for found in every:
        reason = _why_left(model, found.module, named=only is not None)
        if found not in chosen:
            reason = "not named"
        if reason is None:
            selected.append(found)
        else:
            left.append(Change.unchanged(found.path, describe(found.module), reason))
    if not selected:
        raise ValueError(
            f"{_CALLER} expects a model with batch normalization to recalibrate, got {type(model).__name__} "
            f"with none ({_listed(left) or 'no such layers'}). Name frozen layers in only= to include them. "
            "A scripted or exported network no longer has layers: recalibrate it before scripting or export."
        )
    return selected, left


def _why_left(model: nn.Module, layer: nn.Module, *, named: bool) -> str | None:
    mean, var = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
    if mean is None or var is None:
        return "no running mean and variance"
    if is_lazy(mean):
        return "number of channels not yet known: run the model once first"
    if not named and is_frozen(layer):
        return "frozen"
    if not named and model.training and not layer.training:
        return "frozen: in evaluation mode within a model in training mode"
    return None


def _check_same(processes: Processes, paths: list[tuple[str, ...]], **arguments: Any) -> None:
    for rank, (others, other_arguments) in enumerate(processes.gather((paths, arguments))):
        if others != paths:
            raise ValueError(
                f"{_CALLER} expects the same model and layers on every rank, got {len(paths)} layers here and "
                f"{len(others)} on rank {rank}, or different paths. Use the same model, or pass synchronize=False."
            )
        for name, value in arguments.items():
            if other_arguments[name] != value:
                raise ValueError(
                    f"{_CALLER} expects the same {name} on every rank, got {value!r} here and "
                    f"{other_arguments[name]!r} on rank {rank}. Pass the same, or synchronize=False."
                )


def _unwrapped(model: nn.Module) -> nn.Module:
    # The wrapper's forward communicates with ranks that may have fewer batches, or copies the hooks to replicas.
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner: nn.Module = model.module
        return inner
    return model


def _new_statistics(found: Found, before: Statistics, rows: Rows, samples: int, prior: float) -> Statistics:
    """Return the new statistics of a layer; a row without data keeps its former ones."""
    mean, var = before.mean.clone(), before.var.clone()
    total = sum(moments.count.item() for moments in rows)
    for row, moments in enumerate(rows):
        if moments.count == 0:
            continue
        try:
            new_mean, new_var = moments.mean.to(mean.device), moments.var_unbiased.to(var.device)
        except ValueError:
            raise ValueError(
                f"{_CALLER} expects more than one value per channel, got one in all the data at {found.path!r}. "
                "One value has no variance. Pass more data."
            ) from None
        if prior > 0:
            n = samples * moments.count.item() / total
            new_mean, new_var = (
                before.mean[row].lerp(new_mean, n / (prior + n)),
                before.var[row].lerp(new_var, n / (prior + n)),
            )
        mean[row], var[row] = new_mean, new_var
    dtype = running_buffer(found.module, "running_var").dtype
    for what, values in (("mean", mean), ("variance", var)):
        if not values.to(dtype).isfinite().all():
            raise ValueError(
                f"{_CALLER} expects finite values at every layer, got a {what} that is not finite in {dtype} at "
                f"{found.path!r}. Check the data and the layers before it for NaN and overflow."
            )
    return Statistics(mean, var)


def _report(
    selected: list[Found],
    left: list[Change],
    before: list[Statistics],
    measured: Measured,
    new_statistics: Callable[[int, Rows, int], Statistics],
    passes: str,
    ranks: int,
) -> Recalibration:
    if measured.batches == 0:
        raise ValueError(f"{_CALLER} expects at least one batch, got empty data. Pass more data.")
    layers, changed = [], []
    for number, found in enumerate(selected):
        calls = measured.of_layer(number)
        rows = merged(empty_moments(found.module), *calls)
        if not any(moments.count > 0 for moments in rows):
            reason = "all its values are masked" if calls else "not reached by the data"
            left = [*left, Change.unchanged(found.path, describe(found.module), reason)]
            continue
        now = new_statistics(number, rows, measured.samples)
        shape = running_buffer(found.module, "running_mean").shape
        layer = LayerStatistics(found.paths, rows, calls, *(t.reshape(shape) for t in (*before[number], *now)))
        layers.append(layer)
        changed.append(Change(found.path, describe(found.module), layer.change(), layer.remarks()))
    if not layers:
        raise ValueError(
            f"{_CALLER} expects the data to reach the selected layers, got values at none of them "
            f"({_listed(left)}). Pass a forward= that calls them, and a mask= that keeps some values."
        )
    return Recalibration(
        _CALLER, tuple(changed), tuple(left), tuple(layers), passes, measured.batches, measured.samples, ranks,
        measured.kept,
    )  # fmt: skip


def _listed(left: list[Change]) -> str:
    return "; ".join(f"{change.path or '(model)'}: {change.reason}" for change in left)


def _write(found: Found, statistics: Statistics, batches: int, undo: UndoOnFailure) -> None:
    """Write the statistics into the layer's buffers, and count the batches if the layer averages by their number."""
    values = {"running_mean": statistics.mean, "running_var": statistics.var}
    tracked = getattr(found.module, "num_batches_tracked", None)
    if tracked is not None and getattr(found.module, "momentum", None) is None:
        values["num_batches_tracked"] = torch.full_like(tracked, batches)
    for name, value in values.items():
        buffer = running_buffer(found.module, name)
        undo.before(restorer(buffer))
        try:
            overwrite(buffer, value.reshape(buffer.shape))
        except RuntimeError as error:
            raise ValueError(
                f"{_CALLER} expects running statistics that can be written, got {name} of {found.path!r} with "
                f"{_options.in_one_line(error)}. Give the layer a copy: "
                f"layer.{name} = layer.{name}.clone()."
            ) from error
