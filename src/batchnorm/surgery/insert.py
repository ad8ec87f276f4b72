"""Batch normalization in a network that has none, which starts by changing nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import _checks, walk
from batchnorm.models.batches import Forward, check_data, default_forward, device_of, moved
from batchnorm.models.outputs import check_unchanged
from batchnorm.models.report import Change, Report, Result
from batchnorm.models.selection import Choice, select, some_paths
from batchnorm.moments import Moments
from batchnorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d

_FOR_DIMS: dict[int, type[nn.Module]] = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
_VERB = "insert_batchnorm"


def insert_batchnorm(
    model: nn.Module,
    after: Choice,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    inplace: bool = False,
) -> Result[Report]:
    """Put batch normalization after modules of a trained network, which then computes what it did.

    One pass over the data measures the mean μ and the unbiased variance σ² of each module's output; they become the
    running statistics, with γ = √(σ² + eps) and β = μ. In evaluation the new layer is the identity, to rounding; in
    training it is it up to how far a batch's statistics are from the data's. A module becomes
    `Sequential(module, BatchNorm)`, and its keys in the `state_dict` begin with `0.`.

    Args:
        model: Any module, trained or not.
        after: Where: a pattern for paths such as `"features.*"`, several, module classes such as `torch.nn.Conv2d`, or
            a predicate of path and module. What is chosen returns one tensor `[N, C, *S]`.
        data: An iterable of batches, read once: tensors, tuples (as many leading parts as the model's `forward`
            requires, so that labels stay out), or dicts; the same data that training goes on with.
        forward: `forward(model, batch)` calls the model, where that is not enough.
        eps: As in `BatchNorm`.
        momentum: As in `BatchNorm`.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model (the new `Sequential`, where the model itself was chosen), and the report.

    Raises:
        TypeError: model is no module; data are no batches, or do not fit the model's `forward`.
        ValueError: nothing is chosen, or is not reached by the data; an output is no `[N, C, *S]`, not finite, or of
            one value per channel; the model does not work, or not the same, with the layers. It is then as it was.

    Numerics: moments are float64. γ and β are computed from the statistics as they are stored.

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
    _checks.check_module(_VERB, model)
    check_data(_VERB, data)
    if not inplace:
        model = walk.copied(_VERB, model)
    chosen = _chosen(model, after)
    with walk.restored(model, buffers=True), torch.no_grad():
        walk.set_mode(model, training=False)
        outputs, first, before = _measure(model, chosen, data, forward)
    layers = [_layer(found, outputs[found.module], eps, momentum) for found in chosen]

    changes = []
    for found, layer in zip(chosen, layers, strict=True):
        was = type(found.module).__name__
        changes.append(Change(found.path, was, f"{was}, {type(layer).__name__}({layer.num_features})"))
    inserted: list[tuple[nn.Module, nn.Sequential]] = []
    root = model
    try:
        for found, layer in zip(chosen, layers, strict=True):
            both = nn.Sequential(found.module, layer)
            both.training = layer.training = found.module.training
            root = walk.replace(root, found.module, both)
            inserted.append((found.module, both))
        _compare(root, before, first, forward)
    except BaseException:
        for module, both in reversed(inserted):
            root = walk.replace(root, both, module)
        raise
    return Result(root, Report(_VERB, tuple(changes)))


class _Output:
    """What a module put out over all the data."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.dims = 0
        self.dtype = torch.float32
        self.device = torch.device("cpu")


def _chosen(model: nn.Module, after: Choice) -> list[walk.Found]:
    everything = walk.norm_layers(model, nn.Module)
    found = select(_VERB, everything, after, argument="after")
    if not found:
        raise ValueError(
            f"{_VERB} expects `after` to choose a module, got {after!r}, which chooses none of {len(everything)}. "
            f"There are: {some_paths(everything[1:])}."
        )
    return found


def _measure(
    model: nn.Module, chosen: list[walk.Found], data: Iterable[Any], forward: Forward | None
) -> tuple[dict[nn.Module, _Output], Any, object]:
    """The output of each chosen module over the data; the first batch, and the model's output for it."""
    outputs = {found.module: _Output() for found in chosen}
    paths = {found.module: found.path for found in chosen}

    def note(module: nn.Module, args: Any, y: Any) -> None:
        _check_output(paths[module], module, y)
        output = outputs[module]
        moments = Moments.of(y.detach())
        output.moments = moments if output.moments is None else output.moments.merge(moments)
        output.dims, output.dtype, output.device = y.dim(), y.dtype, y.device

    handles = [module.register_forward_hook(note) for module in outputs]
    forward = forward or default_forward(_VERB)
    device, first, before, count = device_of(model), None, None, 0
    try:
        for batch in data:
            y = forward(model, moved(batch, device))
            if count == 0:
                first, before = batch, y
            count += 1
    finally:
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError(f"{_VERB} expects data with at least one batch, got none. Make the iterator anew.")
    return outputs, first, before


def _check_output(path: str, module: nn.Module, y: Any) -> None:
    name = f"{path or 'the model'} ({type(module).__name__})"
    if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() not in _FOR_DIMS:
        came = f"a tensor {list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(
            f"{_VERB} expects what is chosen to return one tensor [N, C, *S] with at most three spatial dimensions, "
            f"got {came} from {name}. Choose other modules."
        )
    if isinstance(module, nn.Linear) and y.dim() > 2:
        raise ValueError(
            f"{_VERB} expects channels in the second place, got {list(y.shape)} from {name}, where they come last. "
            "Choose a module after which the output is [N, C]."
        )


def _layer(found: walk.Found, output: _Output, eps: float, momentum: float | None) -> nn.Module:
    """Batch normalization that is the identity for these statistics."""
    moments, name = output.moments, f"{found.path or 'the model'} ({type(found.module).__name__})"
    if moments is None:
        raise ValueError(
            f"{_VERB} expects data that reach what is chosen, got data that do not reach {name}. "
            "Choose what the model calls, or pass forward= to call it otherwise."
        )
    if moments.count < 2:
        raise ValueError(
            f"{_VERB} expects more than one value per channel, got one from {name}. One value has no variance: pass "
            "more data."
        )
    if not (moments.mean.isfinite().all() and moments.m2.isfinite().all()):
        raise ValueError(f"{_VERB} expects finite outputs, got NaN or infinity from {name}. Look at the data first.")
    # As half precision is trained: its own vectors would round the identity to three digits.
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


def _compare(model: nn.Module, before: object, batch: Any, forward: Forward | None) -> None:
    with walk.restored(model, buffers=True), torch.no_grad():
        walk.set_mode(model, training=False)
        try:
            after = (forward or default_forward(_VERB))(model, moved(batch, device_of(model)))
        except Exception as error:
            raise ValueError(
                f"{_VERB} expects a model that calls what is chosen and takes nothing else of it, got "
                f"{type(model).__name__}, which then raised {_checks.in_one_line(error)}. Choose other modules."
            ) from error
    check_unchanged(_VERB, before, after, "Something in it reads a module that was chosen without calling it")
