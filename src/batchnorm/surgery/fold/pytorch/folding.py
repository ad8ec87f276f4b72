"""Remove batch normalization from a network of PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import walk
from batchnorm.distributed.owners import check_not_sharded
from batchnorm.models import gate, lowering
from batchnorm.models import model_graph as tracing
from batchnorm.models.description import describe
from batchnorm.models.errors import Untraceable
from batchnorm.models.inputs import Inputs, evaluate, not_taken
from batchnorm.models.outputs import outputs
from batchnorm.models.recording import fewer_samples
from batchnorm.models.report import FLOAT64, Change, FoldReport, Result
from batchnorm.surgery.fold.network import Call
from batchnorm.surgery.fold.pytorch.copies import copied, working_copy
from batchnorm.surgery.fold.pytorch.counting import count_batch_norms
from batchnorm.surgery.fold.pytorch.emit import Emitter
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import TorchLinear
from batchnorm.surgery.fold.pytorch.trial import try_plan
from batchnorm.surgery.fold.search import Search
from batchnorm.undo import UndoOnFailure

SAMPLES = 2  # samples of the example that every fold is tried on


def fold(
    model: nn.Module, example_inputs: Any, *, inplace: bool = False, tolerance: float | None = None
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
            model's device. If the report's `how` is not "fixed", the result takes every batch and image size that the
            model takes.
        inplace: Whether to turn the model itself into the folded network, which keeps the weights that did not change.
            Otherwise the model is left unchanged.
        tolerance: The relative error that one fold may make, even if the model's own error is smaller than half of it;
            by default 1e-12 for float64, 1e-5 for float32, 1e-2 for float16 and 5e-2 for bfloat16.

    Returns:
        A graph module in evaluation mode, and the report. Its parameters have the model's names; it can be copied,
        pickled, saved, exported, and moved between devices and dtypes. Its forward takes the arguments that the example
        has; others keep their defaults. It returns the containers that the model returns, and ignores `train()`. Hooks
        are not carried over, except if the model raises without them, or if hooks of its own package change its
        results. If the model cannot be traced as a whole, the result is a copy of it with such graph modules as parts.

    Raises:
        TypeError: The model is not a module.
        ValueError: The model cannot be called with the inputs, cannot be copied, or is sharded (FSDP, tensor parallel).
        FoldError: The folded network's results are not the original's. After any error the model is unchanged.

    Numerics: Weights are computed in float64 and rounded once to each parameter's dtype. Each fold is computed before
        and after, on the example's values and on random ones. A fold is skipped and reported if its error exceeds both
        the tolerance and twice the model's own error.

    Source: the mathematics page, "Folding, at inference"; Ding et al. 2021 (RepVGG), section 3.3, for the branches.

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
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"fold expects a torch.nn.Module that is not scripted, got {type(model).__name__}. Pass the network."
        )
    check_not_sharded("fold", model)
    walk.check_has_values("fold", model)
    inputs = Inputs.of(example_inputs)
    with walk.restored(model):
        folded, report = _fold_checked(model, inputs, inplace, tolerance)
    return Result(_become(model, folded) if inplace else folded, report)


def _fold_checked(
    model: nn.Module, inputs: Inputs, share: bool, tolerance: float | None
) -> tuple[nn.Module, FoldReport]:
    working, notes = working_copy(model, inputs, share=share)
    try:
        counts = count_batch_norms(working, inputs)
    except Exception as error:
        if _takes(model, inputs):
            raise ValueError(
                "fold expects a model that computes the same as its copy, but the copy raised "
                f"{type(error).__name__}: {error}. Let its hooks use the module that they are called with, because the "
                "hooks of the copy still refer to the model."
            ) from error
        raise not_taken("fold", "example_inputs", error) from error
    total = counts.batch_norm + counts.fused
    if total == 0:
        return working, FoldReport("fold", how="nothing to fold", notes=notes)
    original = _Original.of(working, inputs, tolerance)
    few, _ = fewer_samples(working, inputs, SAMPLES, original.for_example)
    found = _folded(working, few, original)
    errors = original.compared(found.model)
    gate.check_whole(errors, original.limit, original.reference)
    left = count_batch_norms(found.model, inputs)
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


@dataclass
class _Original:
    """The original's results, with which the folded network's are compared, and the error that one fold may make."""

    inputs: tuple[Inputs, ...]
    own: list[Tensor]
    exact: list[Tensor]
    reference: str
    limit: float

    @classmethod
    def of(cls, working: nn.Module, inputs: Inputs, tolerance: float | None) -> _Original:
        tried = (inputs, inputs.random())
        own = _results(working, tried)
        try:
            exact = _results(copied(working, share=False).double(), [i.to(torch.float64) for i in tried])
            reference = FLOAT64
        except Exception:  # it casts by itself, or has no float64 kernels
            exact, reference = own, "the original itself, which does not run in float64"
        limit = gate.tolerance_for(tolerance, [t.dtype for t in own if t.is_floating_point()])
        return cls(tried, own, exact, reference, limit)

    @property
    def for_example(self) -> list[Tensor]:
        """The results for the example, without those for random inputs."""
        return self.own[: len(self.own) // len(self.inputs)]

    def compared(self, folded: nn.Module) -> gate.Error:
        """Return the largest errors of the original and of the folded network."""
        return gate.Error.of(gate.Results(self.own, _results(folded, self.inputs), self.exact))


def _results(model: nn.Module, inputs: Iterable[Inputs]) -> list[Tensor]:
    return [tensor for each in inputs for tensor in outputs(evaluate(model, each))]


def _folded(working: nn.Module, inputs: Inputs, original: _Original) -> _Folded:
    """Fold the model as a whole, in parts, or exported; choose the way that leaves the fewest batch normalizations.

    Traced models, and traced parts that Python code calls, take every size. Exported models may not, and export is
    slow.
    """
    try:
        trace = tracing.trace(working, inputs, ways=("fx",), prepare=lowering.lower)
    except Untraceable:
        pass
    else:
        if not trace.refused:
            return _fold_graph(trace, working, original)
    parts = _fold_modules(copied(working, share=True), inputs, original, ("fx",))
    if not parts.left:
        return parts
    try:
        trace = tracing.trace(copied(working, share=True), inputs, prepare=lowering.lower)
    except Untraceable as error:
        parts = _fold_modules(working, inputs, original, ("fx", "export"))
        parts.notes = (f"the whole cannot be traced: {error}",)
        return parts
    whole = _fold_graph(trace, working, original)
    if len(parts.left) < len(whole.left) or (trace.refused and len(parts.left) == len(whole.left)):
        return parts
    if trace.refused:
        sizes = ", ".join(str([list(x.shape) for x in refused.tensors()]) for refused in trace.refused)
        whole.how = "fixed"
        whole.notes = (f"only for sizes like the example's: the original takes {sizes} too",)
    return whole


def _become(model: nn.Module, folded: nn.Module) -> nn.Module:
    """Turn the model object itself into the folded network, so that references to it remain valid."""
    with UndoOnFailure() as undo:
        undo.before(setattr, model, "__class__", type(model))
        undo.before(object.__setattr__, model, "__dict__", model.__dict__)
        model.__class__ = type(folded)
        model.__dict__ = folded.__dict__
    return model


def _fold_graph(trace: tracing.Trace, working: nn.Module, original: _Original, prefix: str = "") -> _Folded:
    """Fold a traced model, or the part of one whose path is `prefix`."""
    network = TorchNetwork(trace)
    search = Search(network, original.limit, partial(try_plan, network))
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


def _fold_modules(working: nn.Module, inputs: Inputs, original: _Original, ways: tuple[str, ...]) -> _Folded:
    """Fold the largest parts that can be traced, each with the inputs that it has in a run of the whole."""
    calls: dict[nn.Module, Inputs] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Inputs(args, kwargs).map(torch.clone))

    with walk.restored(working):
        for module in working.modules():
            module.register_forward_pre_hook(keep, with_kwargs=True)
        evaluate(working, inputs)
    found = _Folded(working, "modules")
    done: set[nn.Module] = set()

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            path = walk.joined(prefix, name)
            if child in done or not walk.norm_layers(child):
                continue
            done.add(child)
            if walk.is_batch_norm(child):
                was = describe(child)
                found.left.append(Change.unchanged(path, was, "the module that calls it cannot be traced"))
                continue
            part = _fold_part(working, child, calls.get(child), original, path, ways)
            if part is None:
                visit(child, path)
            else:
                found.changed += part.changed
                found.left += part.left

    visit(working, "")
    return found


def _fold_part(
    working: nn.Module, part: nn.Module, given: Inputs | None, original: _Original, path: str, ways: tuple[str, ...]
) -> _Folded | None:
    """Replace a part of the model by the folded part; return None, and change nothing, if that is impossible."""
    if given is None:
        return None
    try:
        trace = tracing.trace(copied(part, share=True), given, ways=ways, prepare=lowering.lower)
    except Untraceable:
        return None
    if trace.refused:
        return None
    found = _fold_graph(trace, part, original, path)
    walk.replace(working, part, found.model)
    try:
        same = original.compared(working).allowed(original.limit, gate.AMPLIFICATION)
    except Exception:  # the rest of the model reads modules inside the part
        same = False
    if not same:
        walk.replace(working, found.model, part)
        return None
    return found
