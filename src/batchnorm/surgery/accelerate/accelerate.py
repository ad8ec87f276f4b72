"""Speed up the training of an existing network: this library's layers, fused with additions and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm import _checks, _options, walk
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.foreign import applies_followers
from batchnorm.models.data.inputs import Inputs, evaluate
from batchnorm.models.data.outputs import difference
from batchnorm.models.description import describe
from batchnorm.models.execution.progress import PATIENCE, Bar, bar
from batchnorm.models.execution.recording import record_calls
from batchnorm.models.report import Change, Report, Result
from batchnorm.nn import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from batchnorm.nn.followed import followed, followers, fused_activation, is_foreign
from batchnorm.surgery.accelerate.find_fusions import Fused, Fusions, find_fusions
from batchnorm.surgery.accelerate.fused_forward import fused_class, original_class, undo_fusion
from batchnorm.undo import UndoOnFailure

__all__ = ["AccelerateReport", "accelerate", "undo_fusion"]

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_FUSABLE = (*_OURS.values(), BatchNorm)


@dataclass(frozen=True)
class AccelerateReport(Report):
    """The report of `accelerate`.

    Attributes:
        fused: The operations fused with each layer, by the layer's path.
        difference: The largest change of the output on the example inputs in evaluation, relative to the largest value;
            None without example inputs.
        speedup: The time of a training step before, divided by the time after; None without `measure=True`. If it is
            not above 1, nothing was changed.
    """

    fused: Mapping[str, Fused] | None = None
    difference: float | None = None
    speedup: float | None = None

    def _counts(self) -> list[str]:
        (counts,) = super()._counts()
        counts += f", {len(self.fused or {})} fused with following operations"
        if self.difference is not None:
            counts += f"; outputs differ by {self.difference:.1e}"
        return [counts if self.speedup is None else f"{counts}; training step {self.speedup:.2f} times as fast"]


def accelerate(
    model: nn.Module,
    example_inputs: Any = None,
    inplace: bool = False,
    *,
    measure: bool = False,
    progress: bool | None = None,
) -> Result[AccelerateReport]:
    """Replace batch normalization with this library's, and fuse it with the additions and activations after it.

    Each `torch.nn.BatchNorm*d` becomes this library's layer: a subclass, with the same parameters, buffers, hooks and
    mode. With `inplace=True` it stays the same object. If an addition, an activation or both follow a layer, the
    `forward` of the smallest module that contains them is rewritten to compute `activation(BN(x) + residual)` in one
    operation. This requires that the module's graph is the same in training and in evaluation. Calls for which the
    graph is not valid (other arguments, changed attributes, hooks) use the class's own `forward`.

    The rewritten module's class is a subclass of its former class, with the same name. It can be copied and pickled,
    and has the same `state_dict`. `batchnorm.convert(model, to=torch.nn)` undoes everything.

    Args:
        model: Any module.
        example_inputs: The arguments of one call of the model: a tensor, a tuple of positional arguments, or a mapping
            of named arguments. Pass a few samples in the dtype and on the device of training. Each rewritten `forward`
            is then compared with the original in both modes, and modules that take lists of tensors can be rewritten.
        inplace: Whether to change the model itself instead of a copy.
        measure: Whether to time training steps of the original and the accelerated model alternately on the example
            inputs, and to change nothing if the accelerated model is not faster. Pass a batch of the size of training.
            This takes at most about 2 seconds, or the time of 12 steps if that is longer. On a CPU, the CPU time of all
            threads counts. The choice depends on the machine and its load. Both choices compute the same up to
            rounding.
        progress: Whether to show a progress bar on standard error after 3 seconds (needs rich); by default, if that is
            a terminal and rich is installed.

    Returns:
        The model, and a report of each layer: its replacement and the operations fused with it, or the reason why
        there are none.

    Raises:
        TypeError: model is not a module.
        ValueError: the model does not take the example inputs, cannot be copied, or is sharded; or measure is true, and
            there are no example inputs or the model cannot train on them. The model is then unchanged.
        ImportError: progress is true, and rich is not installed.

    Numerics: as `batchnorm.functional.batch_norm`; in float64 a training run has the same losses to rounding.

    Examples:
        >>> import torch
        >>> block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> model, report = accelerate(block, torch.rand(2, 3, 8, 8))
        >>> print(report.changed[0].now)
        BatchNorm2d(8) + relu
    """
    _checks.check_module("accelerate", model)
    check_not_sharded("accelerate", model)
    if measure and example_inputs is None:
        raise ValueError(
            "accelerate with measure=True expects example inputs, got None. Pass a batch of training: "
            "accelerate(model, images, measure=True)."
        )
    if not inplace:
        model = walk.copied("accelerate", model)
    layers = walk.norm_layers(model)
    left = [Change.unchanged(f.path, _name(f.module), why) for f in layers if (why := _why_left(f.module))]
    faster = {f.path: kind for f in layers if (kind := _faster(f.module)) and not _why_left(f.module)}
    swapped = {f.path: faster[f.path] for f in layers if f.path in faster and faster[f.path] is not type(f.module)}
    ours = [f.path for f in layers if f.path in faster]

    with bar("accelerate", progress, after=PATIENCE) as shown:
        tried = _find_and_try(model, swapped, ours, example_inputs, measure, shown)
    found = tried.found
    if tried.slower:
        left += [Change.unchanged(path, _name(model.get_submodule(path)), tried.slower) for path in ours]
        swapped, ours, found = {}, [], Fusions()
    _add_own_activations(model, ours, found)
    changed: list[Change] = []
    for path in ours:
        layer, fused = model.get_submodule(path), found.fused.get(path)
        now = _name(layer, swapped.get(path)) + (f" + {fused}" if fused else "")
        reason = _where(path, fused) if fused else found.reasons.get(path, "")
        (changed if path in swapped or fused else left).append(Change(path, _name(layer), now, reason))
    change = None if tried.slower else tried.difference
    report = AccelerateReport(
        "accelerate", tuple(changed), tuple(left), found.fused, change, tried.speedup, notes=tried.notes
    )
    result = Result(model, report)  # before the change, after which no interruption can undo it
    _apply(model, swapped, found)
    return result


def _add_own_activations(model: nn.Module, paths: list[str], found: Fusions) -> None:
    """Add the activations that layers of other libraries apply themselves."""
    for path in paths:
        layer = model.get_submodule(path)
        act, named = followers(layer).get("act"), fused_activation(layer) if followers(layer) else None
        if named is not None and named[0] != "none":
            found.fused[path] = Fused(path, False, named[0])
        elif act is not None and named is None:
            found.reasons[path] = f"its own activation {type(act).__name__} is applied after it"


def _where(path: str, fused: Fused) -> str:
    if fused.holder == path:
        return "its own activation"
    return f"in {fused.holder or 'the model'}"


def _faster(layer: nn.Module) -> type[nn.Module] | None:
    """Return this library's class for the layer, which it may have already; None if there is none."""
    kind = type(layer)
    if kind in _OURS:
        return _OURS[kind]
    if kind in _FUSABLE or is_foreign(kind):
        return kind
    return followed(kind) if applies_followers(layer) else None


def _name(layer: nn.Module, kind: type[nn.Module] | None = None) -> str:
    """Describe the layer briefly, with its own class or with its future class."""
    namespace = "torch.nn." if (kind or type(layer)).__module__.startswith("torch.") else ""
    return namespace + describe(layer, kind)


def _why_left(layer: nn.Module) -> str:
    """Return why a layer is not replaced; empty if it is replaced or is already one of this library's."""
    kind = type(layer)
    if kind.__module__.startswith("batchnorm."):
        return ""
    if walk.is_frozen(layer):
        return "is another library's frozen layer; batchnorm.convert(model, batchnorm.nn) replaces it"
    if isinstance(layer, nn.SyncBatchNorm):
        return "synchronizes processes; batchnorm.convert replaces it"
    if _faster(layer) is None:
        return f"has its own class {kind.__module__}.{kind.__qualname__}, whose forward may do more"
    if "forward" in vars(layer):
        return "has its own forward instead of its class's"
    try:
        _options.check_eps(kind.__name__, layer.eps)  # type: ignore[arg-type]
        _options.check_momentum(kind.__name__, layer.momentum)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


class _Tried(NamedTuple):
    """The fusions found; and with example inputs, the output's change, the speedup if measured, and notes."""

    found: Fusions
    difference: float | None = None
    times: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        return None if self.times is None else self.times[0] / self.times[1]

    @property
    def slower(self) -> str:
        """Why nothing is changed; empty if the accelerated model is faster, or was not measured."""
        if self.times is None or self.times[1] < self.times[0]:
            return ""
        before, after = (f"{seconds * 1e3:.3g} ms" for seconds in self.times)
        return f"a training step takes {before}, and {after} with this library's layers"


def _find_and_try(
    model: nn.Module,
    swapped: dict[str, type[nn.Module]],
    ours: list[str],
    example_inputs: Any,
    measure: bool,
    shown: Bar,
) -> _Tried:
    """Find the fusions and try them on a copy that shares the tensors."""
    shown.during("tracing")
    try:
        trial = walk.trial_copy("accelerate", model)
    except ValueError as error:
        if example_inputs is not None:
            raise
        reason = f"the model cannot be copied to be traced: {error.__cause__}"
        return _Tried(Fusions(reasons=dict.fromkeys(ours, reason)))
    with walk.restored(trial, buffers=True):
        undo_fusion(trial)
        norms = {path: layer for path in ours if _fuses(layer := trial.get_submodule(path))}
        if example_inputs is None:
            return _Tried(find_fusions(trial, norms, None))
        inputs = Inputs.of(example_inputs)
        before, calls = record_calls("accelerate", trial, ours, inputs)
        found = find_fusions(trial, norms, calls)
    _apply(trial, swapped, found)
    for path in shown.over(list(found.rewrites), "comparing", len(found.rewrites)):
        if why := _disagreement(trial.get_submodule(path), calls[path]):
            _undo(trial, found, path, why)
    with walk.restored(trial, buffers=True):
        walk.set_mode(trial, training=False)
        after = evaluate(trial, inputs)
    times = None
    if measure and ours:
        from batchnorm.surgery.accelerate import measuring

        shown.during("measuring")
        times = measuring.step_times(walk.trial_copy("accelerate", model), trial, inputs)
    from batchnorm import memory  # not needed by the other functions that change a model, like the import above

    return _Tried(found, difference(before, after).relative, times, memory.advice(_bytes_per_sample(ours, calls)))


def _bytes_per_sample(layers: list[str], calls: dict[str, Inputs]) -> int:
    """Return the size of the largest input of a layer on the CPU, divided by its number of samples."""
    inputs = (t for path in layers if path in calls for t in calls[path].args if isinstance(t, Tensor))
    return max((t.nbytes // t.shape[0] for t in inputs if t.device.type == "cpu" and t.numel()), default=0)


def _fuses(layer: nn.Module) -> bool:
    """Return whether operations after the layer may be fused with it: it applies no activation of its own."""
    return not followers(layer) or fused_activation(layer) == ("none", 0.0)


def _apply(model: nn.Module, swapped: dict[str, type[nn.Module]], found: Fusions) -> None:
    """Give the layers and the rewritten modules their new classes; if an exception is raised, change none."""
    new = {model.get_submodule(path): kind for path, kind in swapped.items()}
    new |= {model.get_submodule(path): fused_class(rewrite) for path, rewrite in found.rewrites.items()}
    with UndoOnFailure() as undo:
        for module, kind in new.items():
            undo.before(setattr, module, "__class__", type(module))
            module.__class__ = kind


def _undo(model: nn.Module, found: Fusions, path: str, why: str) -> None:
    """Undo the rewriting of one module."""
    module = model.get_submodule(path)
    module.__class__ = original_class(module)
    del found.rewrites[path]
    for layer in [layer for layer, fused in found.fused.items() if fused.holder == path]:
        del found.fused[layer]
        found.reasons[layer] = f"{path or 'the model'} rewritten {why}"


def _disagreement(module: nn.Module, call: Inputs) -> str:
    """Return how the rewritten `forward` differs from the class's own in this call; empty if it does not."""
    own_forward = original_class(module).forward
    for training in (False, True):
        try:
            with _isolated(module, call, training) as inputs:
                expected = inputs.call(lambda *args, **kwargs: own_forward(module, *args, **kwargs))
        except Exception:  # such as one value per channel: there is no result to compare with
            continue
        try:
            with _isolated(module, call, training) as inputs:
                found = inputs.call(module.forward)
        except Exception as error:
            return f"raises {_options.in_one_line(error)}"
        differs = difference(expected, found)
        if not differs.is_rounding:
            return f"differs by {differs.relative:.1e} {'in training' if training else 'in evaluation'}"
    return ""


@contextmanager
def _isolated(module: nn.Module, call: Inputs, training: bool) -> Iterator[Inputs]:
    """Set the mode for one call, on copies of the arguments, and then restore buffers and random state."""
    with walk.restored(module, buffers=True), torch.no_grad():
        walk.set_mode(module, training)
        yield call.map(torch.clone)
