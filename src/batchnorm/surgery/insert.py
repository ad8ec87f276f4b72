"""Insert batch normalization into a trained network without changing its output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import _checks, _options, walk
from batchnorm.distributed.owners import check_not_sharded, reduced_parameters_kept
from batchnorm.models.data.batches import Forward, check_data, device_of, own_copy
from batchnorm.models.data.outputs import check_unchanged
from batchnorm.models.execution.calling import DefaultForward
from batchnorm.models.report import Change, Report, Result
from batchnorm.models.selection import Selection, select, some_paths
from batchnorm.moments import Moments
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.undo import UndoOnFailure

_FOR_DIMS: dict[int, type[nn.Module]] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
_CALLER = "insert_batchnorm"
_NOTE = "An existing optimizer does not hold the new parameters: pass them with add_param_group, or create a new one."


def insert_batchnorm(
    model: nn.Module,
    after: Selection,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    inplace: bool = False,
) -> Result[Report]:
    """Insert batch normalization after modules of a trained network, without changing what it computes.

    One pass over the data measures the mean μ and the unbiased variance σ² of each module's output. They become the
    running statistics, with γ = √(σ² + eps) and β = μ. In evaluation the new layer is the identity up to rounding. In
    training it normalizes by the batch's statistics, which differ from those of the data. A module becomes
    `Sequential(module, BatchNorm)`, so its keys in the `state_dict` get the prefix `0.`.

    Args:
        model: Any module, trained or not.
        after: The modules: a pattern for paths such as `"features.*"`, several patterns, module classes such as
            `torch.nn.Conv2d`, or a predicate of path and module. Each returns one tensor `[N, C, *S]`.
        data: An iterable of batches, read once: tensors, tuples (the model gets as many of the first items as its
            `forward` requires, so that labels are left out), or dicts. Use the data that training continues with.
        forward: A function `forward(model, batch)` that calls the model, for other batches or calls.
        eps: As in `BatchNorm`.
        momentum: As in `BatchNorm`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model (the new `Sequential`, if the model itself was chosen), and the report.

    Raises:
        TypeError: model is not a module; data are not batches, or do not fit the model's `forward`.
        ValueError: a pattern matches no module, or no module is chosen; the data do not reach a chosen module; an
            output is not `[N, C, *S]`, is not finite, or has one value per channel; the model raises or computes
            something else with the new layers; the model is sharded, or in DistributedDataParallel. The model is then
            unchanged.

    Numerics: moments are float64. γ and β are computed from the stored statistics.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> trained = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> batches = [torch.rand(4, 3, 8, 8) for _ in range(3)]
        >>> model, report = insert_batchnorm(trained, after=nn.Conv2d, data=batches)
        >>> model[0][1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.testing.assert_close(model.eval()(x), trained(x))
    """
    _checks.check_module(_CALLER, model)
    check_data(_CALLER, data)
    check_not_sharded(_CALLER, model)
    walk.check_has_values(_CALLER, model)
    if not inplace:
        model = walk.copied(_CALLER, model)
    chosen = _chosen_modules(model, after)
    with walk.restored(model, buffers=True), torch.no_grad():
        walk.set_mode(model, training=False)
        forward = forward or DefaultForward(_CALLER)
        outputs, first, before = _measure(model, chosen, data, forward)
    layers = [_layer(found, outputs[found.module], eps, momentum) for found in chosen]

    changes = []
    for found, layer in zip(chosen, layers, strict=True):
        was = type(found.module).__name__
        changes.append(Change(found.path, was, f"{was}, {type(layer).__name__}({layer.num_features})"))
    root = model
    with UndoOnFailure() as undo:
        with reduced_parameters_kept(_CALLER, model):
            for found, layer in zip(chosen, layers, strict=True):
                normalized = nn.Sequential(found.module, layer)
                normalized.training = layer.training = found.module.training
                for parent, key in found.slots:
                    undo.before(parent._modules.__setitem__, key, found.module)
                root = walk.replace(root, found.module, normalized)
        _compare(root, before, first, forward)
        return Result(root, Report(_CALLER, tuple(changes), notes=(_NOTE,) if inplace else ()))


class _MeasuredOutput:
    """The moments of a module's output over all the data."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.dims = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")


def _chosen_modules(model: nn.Module, after: Selection) -> list[walk.Found]:
    everything = walk.norm_layers(model, nn.Module)
    found = [] if after is None else select(_CALLER, everything, after, argument="after")  # None would choose all
    if not found:
        raise ValueError(
            f"{_CALLER} expects `after` to choose a module, got {after!r}, which chooses none of {len(everything)}. "
            f"Choose from: {some_paths(everything[1:])}."
        )
    return found


def _measure(
    model: nn.Module, chosen: list[walk.Found], data: Iterable[Any], forward: Forward
) -> tuple[dict[nn.Module, _MeasuredOutput], Any, object]:
    """Return the outputs of the chosen modules over the data, the first batch, and the model's output for it."""
    outputs = {found.module: _MeasuredOutput() for found in chosen}
    paths = {found.module: found.path for found in chosen}

    def note(module: nn.Module, args: Any, y: Any) -> None:
        _check_output(paths[module], module, y)
        output = outputs[module]
        moments = Moments.of(y.detach())
        output.moments = moments if output.moments is None else output.moments.merge(moments)
        output.dims, output.dtype, output.device = y.dim(), y.dtype, y.device

    handles = [module.register_forward_hook(note) for module in outputs]
    device, first, before, count = device_of(model), None, None, 0
    try:
        for batch in data:
            y = forward(model, own_copy(batch, device))
            if count == 0:
                first, before = batch, y
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError(f"{_CALLER} expects data with at least one batch, got none. Create the iterator again.")
    return outputs, first, before


def _check_output(path: str, module: nn.Module, y: Any) -> None:
    name = f"{path or 'the model'} ({type(module).__name__})"
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() not in _FOR_DIMS:
        came = f"a tensor {list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(
            f"{_CALLER} expects chosen modules to return one tensor [N, C, *S] with at most three spatial dimensions, "
            f"got {came} from {name}. Choose other modules."
        )
    if isinstance(module, nn.Linear) and y.dim() > 2:
        raise ValueError(
            f"{_CALLER} expects channels in the second dimension, got {list(y.shape)} from {name}, with channels in "
            "the last. Choose a module whose output is [N, C]."
        )


def _layer(found: walk.Found, output: _MeasuredOutput, eps: float, momentum: float | None) -> nn.Module:
    """Return batch normalization that is the identity for these statistics."""
    moments, name = output.moments, f"{found.path or 'the model'} ({type(found.module).__name__})"
    if moments is None:
        raise ValueError(
            f"{_CALLER} expects data that reach every chosen module, got data that do not reach {name}. "
            "Choose modules that the model calls, or pass forward= to call it in another way."
        )
    if moments.count < 2:
        raise ValueError(
            f"{_CALLER} expects more than one value per channel, got one from {name}. One value has no variance: pass "
            "more data."
        )
    if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
        raise ValueError(f"{_CALLER} expects finite outputs, got NaN or infinity from {name}. Check the data first.")
    # float32 for half precision too: half-precision vectors would round the identity to three digits.
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    kind: Any = _FOR_DIMS[output.dims]
    layer: nn.Module = kind(len(moments.mean), eps, momentum, device=output.device, dtype=dtype)
    with torch.no_grad():
        for statistic, value in (("running_mean", moments.mean), ("running_var", moments.var_unbiased)):
            getattr(layer, statistic).copy_(value)
        mean, var = layer.running_mean, layer.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(var, Tensor)
        layer.weight.copy_((var.double() + eps).sqrt())  # type: ignore[operator]
        layer.bias.copy_(mean)  # type: ignore[operator]
    return layer


def _compare(model: nn.Module, before: object, batch: Any, forward: Forward) -> None:
    with walk.restored(model, buffers=True), torch.no_grad():
        walk.set_mode(model, training=False)
        try:
            after = forward(model, own_copy(batch, device_of(model)))
        except Exception as error:
            raise ValueError(
                f"{_CALLER} expects a model that only calls the chosen modules, got "
                f"{type(model).__name__}, which raised {_options.in_one_line(error)}. Choose other modules."
            ) from error
    check_unchanged(_CALLER, before, after, "Some code in it reads a chosen module without calling it")
