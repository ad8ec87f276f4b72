"""Replace the batch normalization of an existing model by another normalization."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import batchnorm.nn
from batchnorm import walk
from batchnorm._checks import check_module
from batchnorm.distributed.owners import check_not_sharded, reduced_parameters_kept
from batchnorm.foreign import applies_followers
from batchnorm.models.description import describe
from batchnorm.models.report import Change, Report, Result
from batchnorm.models.selection import Selection, select
from batchnorm.nn.followed import followers, plain_class
from batchnorm.surgery.accelerate.fused_forward import undo_fusion
from batchnorm.surgery.convert import per_sample, replacement
from batchnorm.surgery.convert.ranks import RANKS, Given, shapes_in_run
from batchnorm.surgery.convert.replacement import Refused, Replacement, Unconvertible
from batchnorm.walk import class_of

Target = str | type[nn.Module] | ModuleType | Callable[[nn.Module], nn.Module]


def convert(
    model: nn.Module,
    to: Target,
    *,
    only: Selection | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    **options: Any,
) -> Result[Report]:
    """Replace the model's batch normalization by another normalization.

    Parameters and buffers with the same meaning are kept. The parameters are the same objects, so an optimizer can
    continue with them. Modes, hooks and their handles, parametrizations, devices, dtypes and `requires_grad` are kept,
    too. A layer without weight, bias or running statistics does not get them. A layer that is used in several places
    stays one layer. A new layer remembers the one that it replaced. Converting back restores that one, with the current
    state.

    A layer is left unchanged if the conversion would lose something, and the report gives the reason. Examples are a
    subclass with its own `forward` (such as one with an activation), additional parameters, and statistics that the new
    class cannot hold.

    Args:
        model: Any module; it may itself be such a layer.
        to: The replacement: a class of this library or of torch, its name, `torch.nn` or `batchnorm.nn`, or a function
            that takes the layer and returns another. `BatchRenorm` and `BatchRenorm2d` mean the same for a
            `BatchNorm2d`. `torch.nn.GroupNorm`, `LayerNorm`, `InstanceNorm2d` and `Identity` work too. `torch.nn` and
            `batchnorm.nn` mean their class of the same name, so `torch.nn` converts back.
        only: The layers to replace: a pattern for paths such as `"layer4.*"`, several patterns, a class, or a
            predicate of path and layer.
        example_inputs: As in `accelerate`. A run on them shows the number of dimensions of each layer's input. It
            decides whether a layer that takes any number, such as `SyncBatchNorm`, becomes a `BatchNorm1d`,
            `BatchNorm2d` or `BatchNorm3d`, and shows whether the input of a `BatchNorm1d` is `[N, C]` or `[N, C, L]`.
            Without them, the convolution, pooling or linear layer next to the layer shows this. If there is none, the
            new layer takes any number of dimensions, too.
        inplace: Whether to change the model itself instead of a copy.
        **options: Arguments of the class, such as `ghost_size=16` or `momentum=0.01`. Others are taken from the layer.

    Returns:
        The model (the new layer, if the model is a layer itself), and the report.

    Raises:
        TypeError: `to` is none of these; the class does not have an option, or requires one that is missing.
        ValueError: a pattern matches no layer; the class rejects the options for every layer; the model does not take
            the example inputs; it is scripted, or its parameters are sharded (FSDP, tensor parallel); in
            `DistributedDataParallel`, the change would add or freeze parameters. The model is then unchanged.

    `LayerNorm` becomes `GroupNorm(1, C)`: layer normalization over channels and positions, with weight and bias for
    each channel. Unless `num_groups` is given, `GroupNorm` uses the largest number of groups up to 32 that leaves at
    least 2 channels in each, or 16 if the input may be `[N, C]`. A layer whose input may be `[N, C]` is left if a group
    would have one value, because normalization erases a single value. This applies to `InstanceNorm1d`. These classes
    and `Identity` keep no running statistics, and cannot be converted back.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> from batchnorm.nn import FrozenBatchNorm
        >>> model, report = convert(model, to=FrozenBatchNorm)
        >>> print(report)
        convert: 1 changed, 0 left
        <BLANKLINE>
        layer  was             now                   why
        1      BatchNorm2d(8)  FrozenBatchNorm2d(8)
        >>> convert(model, to=torch.nn).model[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    _check_target(to)

    shapes = None if example_inputs is None else shapes_in_run("convert", model, example_inputs)

    def choose(found: walk.Found, layer: nn.Module) -> Replacement:
        if not isinstance(to, (ModuleType, str, type)):
            made = replacement.from_function(layer, to)
            made.reason = per_sample.note_on(made.new)
            return made
        return _replacement(found, layer, to, options, Given.of(layer, model, found.path, shapes))

    finish = undo_fusion if to is torch.nn and only is None else None
    return replace_layers("convert", model, choose, only=only, inplace=inplace, finish=finish)


def replace_layers(
    caller: str,
    model: nn.Module,
    choose: Callable[[walk.Found, nn.Module], Replacement],
    *,
    only: Selection | None,
    inplace: bool,
    kinds: walk.Kinds = walk.is_batch_norm,
    finish: Callable[[nn.Module], object] | None = None,
) -> Result[Report]:
    """Replace each chosen layer by the result of `choose`; if an exception is raised, replace none.

    `choose` gets the places of a layer and the layer. A frozen layer of another library is passed as this library's
    equivalent. `finish` is called with the model afterwards, and may change the classes of its modules.
    """
    check_module(caller, model)
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{caller} expects a model in Python, got {type(model).__name__}. Convert it before torch.jit.script."
        )
    if not inplace:
        check_not_sharded(caller, model)
        model = walk.copied(caller, model)
    planned: list[tuple[walk.Found, Replacement, Change]] = []
    excluded: list[tuple[Change, Unconvertible]] = []
    chosen = select(caller, walk.norm_layers(model, kinds), only)
    check_not_sharded(caller, model, [(found.path, found.module) for found in chosen])
    for found in chosen:
        was = describe(found.module)
        try:
            layer = replacement.adopt(found.module)
            replacement.check_plain(layer)
            made = choose(found, layer)
        except Unconvertible as reason:
            excluded.append((Change.unchanged(found.path, was, str(reason)), reason))
            continue
        reasons = [made.reason] * bool(made.reason) + [f"also at {path}" for path in found.paths[1:]]
        planned.append((found, made, Change(found.path, was, describe(made.new), "; ".join(reasons))))
    if excluded and not planned and all(isinstance(reason, Refused) for _, reason in excluded):
        first, cause = excluded[0]
        raise ValueError(f"{caller} cannot change any layer; {first.path or 'the model'}: {cause}") from cause
    changes, left = tuple(change for *_, change in planned), tuple(change for change, _ in excluded)
    before = {p: p.requires_grad for found, *_ in planned for p in found.module.parameters()}
    with replacement.undone_on_failure(model, [(found, made) for found, made, _ in planned]):
        with reduced_parameters_kept(caller, model):
            for found, made, _ in planned:
                model = made.commit(model, found)
        if finish is not None:
            finish(model)
        # The optimizer of a model cannot hold the parameters of its copy.
        notes = _notes_on_optimizer(before, [made.new for _, made, _ in planned]) if inplace else ()
        return Result(model, Report(caller, changes, left, notes=notes))


def _notes_on_optimizer(before: dict[nn.Parameter, bool], layers: list[nn.Module]) -> tuple[str, ...]:
    """Return the consequences for an optimizer that holds the former parameters, as notes of the report."""
    after = {p for layer in layers for p in layer.parameters()}
    stopped = sum(trained and not p.requires_grad for p, trained in before.items() if p in after)
    gone = sum(trained for p, trained in before.items() if p not in after)
    new = sum(p.requires_grad and not before.get(p, False) for p in after)
    notes = []
    if stopped:
        notes.append(
            f"Parameters that no longer train: {stopped}. They have no gradient, so torch's optimizers skip them, "
            "except LBFGS. An optimizer that holds them resumes with their momentum after unfreeze: create a new one "
            "to avoid this."
        )
    if gone or new:
        notes.append(
            f"Parameters that train now but did not before: {new}; removed: {gone}. Pass the first to the optimizer "
            "with add_param_group if it does not hold them, or create a new optimizer."
        )
    return tuple(notes)


def _check_target(to: object) -> None:
    known = isinstance(to, (ModuleType, str)) or replacement.is_norm_class(to) or to is nn.LayerNorm
    if not known and (isinstance(to, type) or not callable(to)):
        raise TypeError(
            f"convert expects `to` to be a class of normalization, its name, torch.nn or batchnorm.nn, or a function "
            f"of the layer, got {to!r}. For a class of your own pass lambda layer: Mine(layer.num_features)."
        )
    named = (getattr(place, f"{to}{rank}", None) for place in (batchnorm.nn, nn) for rank in ("", *RANKS))
    if isinstance(to, str) and not any(isinstance(found, type) for found in named):
        raise TypeError(
            f"convert expects `to` to name a class of batchnorm.nn or torch.nn, got {to!r}. For example 'BatchRenorm'."
        )


def _replacement(
    found: walk.Found, old: nn.Module, to: str | type[nn.Module] | ModuleType, options: dict[str, Any], given: Given
) -> Replacement:
    if not options and isinstance(to, ModuleType) and not _is_of(old, to):
        back = replacement.restore(old, lambda layer: _is_of(layer, to))
        if back is not None:
            back.new = replacement.without_kernels(back.new) if to is nn else back.new
            return back
    if to is nn and applies_followers(before := replacement.without_kernels(old)):
        if before is old:
            raise Unconvertible("it is one already, from another library")
        return Replacement(before, {})
    kind = class_for(old, to, given.rank)
    if kind is plain_class(class_of(old)) and not options:
        if old is not found.module:
            return Replacement(old, {})
        raise Unconvertible("it is one already")
    if not options and (back := replacement.restore(old, lambda former: class_of(former) is kind)) is not None:
        return back
    if per_sample.is_per_sample(kind):
        # These classes take maps only, and raise an error for one position.
        maps = given.shape is None and issubclass(kind, (nn.InstanceNorm2d, nn.InstanceNorm3d))
        return per_sample.make(old, kind, options, found.path, maps or given.has_positions())
    return replacement.make(old, kind, options, found.path)


def _is_of(layer: nn.Module, namespace: ModuleType) -> bool:
    """Return whether the layer is one of the namespace's; for torch, also one that another library derives."""
    kind = plain_class(class_of(layer))
    return getattr(namespace, kind.__name__, None) is kind or (
        namespace is nn and applies_followers(replacement.without_kernels(layer))
    )


def class_for(old: nn.Module, to: str | type[nn.Module] | ModuleType, rank: str) -> type[nn.Module]:
    """Return the class that `to` means for this layer: of this rank, and lazy if the layer is."""
    lazy = isinstance(old, nn.modules.lazy.LazyModuleMixin)
    if isinstance(to, ModuleType):
        names = [cls.__name__ for cls in class_of(old).__mro__ if issubclass(cls, _NormBase)]
        if followers(old):
            names = [each for name in names for each in (f"{name[:-2]}Act{name[-2:]}", name)]
        candidates = [getattr(to, name, None) for name in (*names, f"BatchNorm{rank}")]
        for kind in candidates:
            if isinstance(kind, type) and issubclass(kind, _NormBase):
                return kind
        raise Unconvertible(f"it takes any number of dimensions, and {to.__name__} has no such layer: pass a class")
    if isinstance(to, str):
        namespace = next(n for n in (batchnorm.nn, nn) if any(hasattr(n, to + s) for s in ("", *RANKS)))
        name = to
    else:
        namespace, name = sys.modules[to.__module__], to.__name__
    if name[-2:] not in RANKS:
        middle = "Act" if ("activation" in vars(old) or followers(old)) and not name.endswith("Act") else ""
        siblings = [f"{name}{middle}{rank}", f"{name}{rank}", name]
    elif rank and name[-2:] != rank:
        raise Unconvertible(f"it takes other inputs ({rank}) than {name}")
    else:
        siblings = [name]
    if lazy:
        siblings = [f"Lazy{sibling.removeprefix('Lazy')}" for sibling in siblings] + siblings
    for sibling in siblings:
        kind = getattr(namespace, sibling, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind
    raise Unconvertible(f"it takes any number of dimensions, and there is no such {name}: pass a class")
