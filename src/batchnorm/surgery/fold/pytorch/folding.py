"""Remove batch normalization from a network of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from batchnorm import walk
from batchnorm._checks import check_module
from batchnorm._options import in_one_line
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.models import gate
from batchnorm.models.data.inputs import Inputs, evaluate, not_taken
from batchnorm.models.data.outputs import outputs
from batchnorm.models.description import describe
from batchnorm.models.execution.progress import PATIENCE, Bar, bar
from batchnorm.models.execution.recording import fewer_samples
from batchnorm.models.graphs import lowering
from batchnorm.models.graphs import model_graph as tracing
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.report import FLOAT64, Change, FoldReport, Result
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.pytorch.copies import copied, working_copy
from batchnorm.surgery.fold.pytorch.counting import counted
from batchnorm.surgery.fold.pytorch.emit import Emitter
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.proof import TorchProof
from batchnorm.surgery.fold.pytorch.states import TorchLinear
from batchnorm.surgery.fold.search import Search
from batchnorm.undo import UndoOnFailure

SAMPLES = 2  # samples of the example that every fold is tried on


def fold(
    model: nn.Module,
    example_inputs: Any,
    *,
    inplace: bool = False,
    tolerance: float | None = None,
    progress: bool | None = None,
) -> Result[FoldReport]:
    """Return the network without batch normalization, for inference, and a report of each one.

    In evaluation, batch normalization is a scale and a shift. They move backward into the convolution or linear layer
    that computes the input, or forward into the layers that read the result, through concatenation, splitting,
    addition, pooling, reshaping and another batch normalization, if that is exact for every reader. If the next
    convolution pads zeros, its border stays exact, too. Parallel linear branches that are added become one. A batch
    normalization that must stay is fused with the activation after it.

    Args:
        model: Any module, in any mode. `fold` folds its computation in evaluation mode.
        example_inputs: An example of its inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on the
            model's device. Its first two samples are used if the model computes the same for these alone. If the
            report's `how` is not "fixed", the result accepts every batch and image size that the model accepts.
        inplace: Whether to turn the model itself into the folded network, which keeps the weights that did not change.
            Otherwise the model is left unchanged.
        tolerance: The relative error that one fold may make, even if the model's own error is smaller than half of it;
            by default 1e-12 for float64, 1e-5 for float32, 1e-2 for float16 and 5e-2 for bfloat16.
        progress: Whether to show a progress bar on standard error after 3 seconds (needs rich); by default, if that is
            a terminal and rich is installed.

    Returns:
        A graph module in evaluation mode, and the report. Its parameters have the model's names; it can be copied,
        pickled, saved, exported, and moved between devices and dtypes. Its forward takes the arguments that the example
        has; others keep their defaults. It returns the containers that the model returns, and ignores `train()`. It has
        no hooks, unless the model raises an error without them, or hooks from the model's own package change its
        results. If the model cannot be traced as a whole, the result is a copy of it with such graph modules as parts.

    Raises:
        TypeError: The model is not a module.
        ValueError: The model cannot be called with the inputs, cannot be copied, or is sharded (FSDP, tensor parallel).
        ImportError: progress is true, and rich is not installed.
        FoldError: The folded network's results are not the original's. After any error the model is unchanged.

    Numerics: Weights are computed in float64 and rounded once to each parameter's dtype. Every place that must keep its
        value is computed before and after, from the example's values and from random ones. A fold is skipped and
        reported if its error there exceeds both the tolerance and twice the model's own error.

    Source: the tutorial, "Fusing into a convolution"; Ding et al. 2021 (RepVGG), section 3.3, for the branches.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> folded, report = fold(model, torch.randn(2, 3, 16, 16))
        >>> report.before, report.remaining
        (1, 0)
        >>> sorted(folded.state_dict())
        ['0.bias', '0.weight']
    """
    check_module("fold", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fold expects a torch.nn.Module that is not scripted, got {type(model).__name__}. Pass the network."
        )
    check_not_sharded("fold", model)
    walk.check_has_values("fold", model)
    inputs = Inputs.of(example_inputs)
    with walk.restored(model), bar("fold", progress, after=PATIENCE) as shown:
        folded, report = _fold_checked(model, inputs, inplace, tolerance, shown)
    result = Result(model if inplace else folded, report)
    if inplace:
        _become(model, folded)
    return result


def _fold_checked(
    model: nn.Module, inputs: Inputs, share: bool, tolerance: float | None, shown: Bar
) -> tuple[nn.Module, FoldReport]:
    shown.during("running the original")
    working, notes = working_copy(model, inputs, share=share)
    try:
        counts, result = counted(working, inputs)
    except Exception as error:
        if _takes(model, inputs):
            raise ValueError(
                "fold expects a model that computes the same as its copy, but the copy raised "
                f"{in_one_line(error)}. Let its hooks use the module that they are called with, because the "
                "hooks of the copy still refer to the model."
            ) from error
        raise not_taken("fold", "example_inputs", error) from error
    total = counts.batch_norm + counts.fused
    if total == 0:
        return working, FoldReport("fold", how="nothing to fold", notes=notes)
    few, of_few = fewer_samples(working, inputs, SAMPLES, outputs(result))
    original = _Original(working, tracing.Runs(working, few, result if few is inputs else of_few), tolerance, shown)
    found = _folded(working, original)
    shown.during("checking the result")
    left, result = counted(found.model, few)
    errors = original.compared(found.model, result)
    gate.check_whole(errors, original.limit, original.reference)
    return found.model, FoldReport(
        "fold",
        tuple(found.changed),
        tuple(found.left),
        how=found.how,
        error=errors.after,
        error_before=errors.before,
        reference=original.reference,
        before=total,
        remaining=left.batch_norm,
        fused=left.fused,
        notes=(*notes, *found.notes),
    )


def _takes(model: nn.Module, inputs: Inputs) -> bool:
    with walk.restored(model, buffers=True):
        walk.set_mode(model, training=False)
        try:
            evaluate(model, inputs)
        except Exception:
            return False
    return True


@dataclass
class _Folded:
    """A folded model, and the result for each batch normalization."""

    model: nn.Module
    how: str
    changed: list[Change] = field(default_factory=list)
    left: list[Change] = field(default_factory=list)
    notes: tuple[str, ...] = ()


class _Original:
    """The original's results, with which the folded network's are compared, and the error that one fold may make.

    The results are for the example, and for random values in the smallest inputs that the model takes.
    """

    def __init__(self, working: nn.Module, runs: tracing.Runs, tolerance: float | None, shown: Bar) -> None:
        self.shown = shown
        (_, result), *_ = runs.found
        self.runs, self._random = runs, runs.smallest.random()
        self._own = outputs((result, evaluate(working, self._random)))
        tried = [inputs.to(torch.float64) for inputs in (runs.inputs, self._random)]
        self.reference = FLOAT64
        try:
            wide = copied(working, share=False).double()
            self._exact = outputs([evaluate(wide, inputs) for inputs in tried])
        except Exception:  # it casts by itself, or has no float64 kernels
            self._exact, self.reference = self._own, "the original itself, which does not run in float64"
        self.limit = gate.tolerance_for(tolerance, [t.dtype for t in self._own if t.is_floating_point()])

    def compared(self, folded: nn.Module, result: Any) -> gate.Error:
        """Return the largest errors of the original, and of the folded network with this result for the example."""
        found = outputs((result, evaluate(folded, self._random)))
        return gate.Error.of(gate.Results(self._own, found, self._exact))

    def agrees(self, folded: nn.Module) -> bool:
        """Return whether the folded network runs, and its errors are allowed."""
        try:
            error = self.compared(folded, evaluate(folded, self.runs.inputs))
        except Exception:  # the rest of the model reads modules inside a part that was replaced
            return False
        return error.allowed(self.limit, gate.AMPLIFICATION)


def _folded(working: nn.Module, original: _Original) -> _Folded:
    """Fold the model as a whole, in parts, or exported; choose the way that leaves the fewest batch normalizations.

    Traced models, and traced parts that Python code calls, take every size. Exported models may not, and export is
    slow.
    """
    original.shown.during("tracing")
    try:
        trace = tracing.trace(working, original.runs, ways=("fx",), prepare=lowering.lower)
    except Untraceable:
        pass
    else:
        if not trace.refused:
            return _fold_graph(trace, working, original)
    parts = _fold_parts(working, original, ("fx",), whole=True)
    if parts is not None:
        return parts
    original.shown.during("tracing")
    try:
        trace = tracing.trace(copied(working, share=True), original.runs, prepare=lowering.lower)
    except Untraceable as error:
        parts = _fold_parts(working, original, ("fx", "export"))
        assert parts is not None
        parts.notes = (f"the whole cannot be traced: {error}",)
        return parts
    found = _fold_graph(trace, working, original)
    if found.left:
        parts = _fold_parts(working, original, ("fx",))
        assert parts is not None
        if len(parts.left) < len(found.left) or (trace.refused and len(parts.left) == len(found.left)):
            return parts
    if trace.refused:
        sizes = ", ".join(str([list(x.shape) for x in refused.tensors()]) for refused in trace.refused)
        found.how = "fixed"
        found.notes = (f"works only for sizes like the example's; the original also takes {sizes}",)
    return found


def _become(model: nn.Module, folded: nn.Module) -> None:
    """Turn the model object itself into the folded network, so that references to it remain valid."""
    with UndoOnFailure() as undo:
        undo.before(setattr, model, "__class__", type(model))
        undo.before(object.__setattr__, model, "__dict__", model.__dict__)
        model.__class__ = type(folded)
        model.__dict__ = folded.__dict__


def _fold_graph(trace: tracing.Trace, working: nn.Module, original: _Original, prefix: str = "") -> _Folded:
    """Fold a traced model, or the part of one whose path is `prefix`."""
    network = TorchNetwork(trace)
    search = Search(network, TorchProof(TorchNetwork(trace), original.limit, original.shown))
    search.fold_all()
    paths = {call: _path(network, call) for call in network.calls}
    emitter = Emitter(network)
    folded = emitter.emit(type(working).__name__)
    names = {call: _norm_name(working, path) for call, path in paths.items()}
    changed, left = search.rows({call: walk.joined(prefix, path) for call, path in paths.items()}, names, emitter.fused)
    return _Folded(folded, trace.how, changed, left)


def _path(network: TorchNetwork, call: Call) -> str:
    """Return the path of the module that holds the call's weight, or calls it."""
    owner = call.state.name.rpartition(".")[0] if isinstance(call.state, TorchLinear) else ""
    return owner or network.trace.paths.get(call.node) or call.node.name


def _norm_name(working: nn.Module, path: str) -> str:
    try:
        module = working.get_submodule(path)
    except AttributeError:
        return "batch_norm"
    return type(module).__name__ if walk.is_batch_norm(module) else "batch_norm"


def _fold_parts(
    working: nn.Module, original: _Original, ways: tuple[str, ...], *, whole: bool = False
) -> _Folded | None:
    """Fold the parts of a copy of the model. Return None if `whole` and a batch normalization stays.

    The rest of the model may read modules inside a part, which are then missing. If so, each part is tried by itself.
    """
    for one_by_one in (False, True):
        parts = _Parts(copied(working, share=True), original, ways, one_by_one=one_by_one, whole=whole)
        parts.visit(parts.found.model, "")
        if whole and parts.found.left:
            return None
        if one_by_one or original.agrees(parts.found.model):
            break
    return parts.found


class _Parts:
    """Folds the largest parts of a model that can be traced, each with the inputs that it has in a run of the whole."""

    def __init__(
        self, working: nn.Module, original: _Original, ways: tuple[str, ...], *, one_by_one: bool, whole: bool
    ) -> None:
        self.found = _Folded(working, "modules")
        self._original, self._ways, self._one_by_one, self._whole = original, ways, one_by_one, whole
        self._runs: dict[nn.Module, tracing.Runs] = {}
        self._done: set[nn.Module] = set()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module not in self._runs:
                self._runs[module] = tracing.Runs(module, Inputs(args, kwargs).map(torch.clone))

        with walk.restored(working):
            for module in working.modules():
                if walk.norm_layers(module):
                    module.register_forward_pre_hook(keep, with_kwargs=True)
            evaluate(working, original.runs.inputs)

    def visit(self, parent: nn.Module, prefix: str) -> None:
        """Fold the parts inside a module."""
        for name, child in list(parent.named_children()):
            path = walk.joined(prefix, name)
            if child in self._done or not walk.norm_layers(child):
                continue
            if self._whole and self.found.left:
                return
            self._done.add(child)
            if walk.is_batch_norm(child):
                why = "the module that calls it cannot be traced"
                self.found.left.append(Change.unchanged(path, describe(child), why))
                continue
            part = self._fold(child, path)
            if part is None:
                self.visit(child, path)
            else:
                self.found.changed += part.changed
                self.found.left += part.left

    def _fold(self, part: nn.Module, path: str) -> _Folded | None:
        """Replace a part of the model by the folded part; return None, and change nothing, if that is impossible."""
        if part not in self._runs:
            return None
        try:
            trace = tracing.trace(copied(part, share=True), self._runs[part], ways=self._ways, prepare=lowering.lower)
        except Untraceable:
            return None
        if trace.refused:
            return None
        found = _fold_graph(trace, part, self._original, path)
        working = self.found.model
        walk.replace(working, part, found.model)
        if self._one_by_one and not self._original.agrees(working):
            walk.replace(working, found.model, part)
            return None
        return found
