"""`fold`: removes batch normalization from a network of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import Node

from batchnorm import walk
from batchnorm.models import lowering
from batchnorm.models import model_graph as tracing
from batchnorm.models.errors import Untraceable
from batchnorm.models.inputs import Inputs, evaluate
from batchnorm.models.outputs import outputs
from batchnorm.models.report import Change, Result
from batchnorm.surgery.fold import gate
from batchnorm.surgery.fold.pytorch.copies import copied, working_copy
from batchnorm.surgery.fold.pytorch.counting import count_batch_norms
from batchnorm.surgery.fold.pytorch.emit import Emitter
from batchnorm.surgery.fold.pytorch.network import TorchNetwork
from batchnorm.surgery.fold.pytorch.states import TorchLinear
from batchnorm.surgery.fold.pytorch.trial import try_plan
from batchnorm.surgery.fold.report import FoldReport
from batchnorm.surgery.fold.search import Search

SAMPLES = 2  # samples of the example that every fold is tried on


def fold(
    model: nn.Module, example_inputs: Any, *, inplace: bool = False, tolerance: float | None = None
) -> Result[FoldReport]:
    """Return the network without batch normalization, for inference, and a report of what went where.

    Every batch normalization is a scale and a shift in evaluation. It moves back into the convolution or linear layer
    that computes its input, or on into those that read its result, through concatenation, addition, pooling, reshaping
    and another batch normalization, where that is exact for every reader; its border is kept where the next
    convolution pads zeros. Parallel linear branches that are added become one. What must stay and has an activation
    after it becomes one operation with it.

    Args:
        model: Any module, in any mode; it is folded as it computes in evaluation.
        example_inputs: What it is called with: a tensor, a tuple of arguments or a dict of keyword arguments, on the
            model's device. The result takes every batch and image size that the model takes, where the report's
            `how` is "fx" or "export".
        inplace: Turn the model itself into the folded network, which then shares the weights that stay, instead of
            leaving it untouched.
        tolerance: The relative error that a fold may make, where the model's own is less than half of it; by
            default 1e-5 for float32, 1e-12, 1e-2 and 5e-2 for float64, float16 and bfloat16.

    Returns:
        A graph module in evaluation mode, with parameters under the model's names, which can be copied, pickled,
        saved, exported, and moved between devices and dtypes; and the report. Its forward takes the arguments that
        the example has; others keep their defaults. Hooks are not carried over; nor does it follow `train()`. Where
        the model cannot be traced as a whole, it is a copy of the model with such graph modules for its parts.

    Raises:
        TypeError: The model is no module.
        ValueError: The model cannot be called with the inputs, or not copied.
        FoldError: The folded network's results are not the original's. The model is as it was, here as always.

    Numerics: in float64, rounded once to each parameter's dtype. Each fold is computed before and after, on the
        example's values and on random ones; one that errs by more than the tolerance and more than twice the
        model's own error is not made, and reported.

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
        raise TypeError(f"model must be a torch.nn.Module that is not scripted, got {type(model).__name__}. Pass it.")
    inputs = Inputs.of(example_inputs)
    with walk.restored(model):
        folded, report = _fold_checked(model, inputs, inplace, tolerance)
    return Result(_become(model, folded) if inplace else folded, report)


def _fold_checked(
    model: nn.Module, inputs: Inputs, share: bool, tolerance: float | None
) -> tuple[nn.Module, FoldReport]:
    working, notes = working_copy(model, share=share)
    try:
        counts = count_batch_norms(working, inputs)
    except Exception as error:
        raise ValueError(
            f"example_inputs must be what the model takes, but calling it raised {type(error).__name__}: {error}. "
            "Pass a tensor, a tuple of arguments or a dict of keyword arguments."
        ) from error
    total = counts.batch_norm + counts.fused
    if total == 0:
        return working, FoldReport("fold", how="nothing to fold", notes=notes)
    checked = _Checked.of(working, inputs)
    limit = checked.limit(tolerance)
    folded, found = _folded(working, inputs.first(SAMPLES), limit, checked)
    errs = checked.error(folded)
    gate.check_whole(errs, limit)
    left = count_batch_norms(folded, inputs)
    return folded, FoldReport(
        "fold",
        tuple(found.changed),
        tuple(found.left),
        how=found.how,
        error=errs.after,
        error_before=errs.before,
        before=total,
        remaining=left.batch_norm,
        fused=left.fused,
        notes=(*notes, *found.notes),
    )


def _folded(working: nn.Module, inputs: Inputs, limit: float, checked: _Checked) -> tuple[nn.Module, _Found]:
    """The way to read the model that leaves least: as a whole, in parts where that does as well, else by export.

    A traced whole, and parts of one that Python goes on to call, take every size. Export may not, and takes long.
    """
    try:
        trace = tracing.trace(working, inputs, ways=("fx",), prepare=lowering.lower)
    except Untraceable:
        pass
    else:
        if not trace.refused:
            return _fold_graph(trace, limit, working)
    parts = _fold_modules(copied(working, share=True), inputs, limit, checked, ("fx",))
    if not parts[1].left:
        return parts
    try:
        trace = tracing.trace(copied(working, share=True), inputs, prepare=lowering.lower)
    except Untraceable as error:
        parts = _fold_modules(working, inputs, limit, checked, ("fx", "export"))
        parts[1].notes = (f"the whole cannot be traced: {error}",)
        return parts
    whole = _fold_graph(trace, limit, working)
    if not trace.refused and len(whole[1].left) <= len(parts[1].left):
        return whole
    if len(parts[1].left) <= len(whole[1].left):
        return parts
    if trace.refused:
        sizes = ", ".join(str([list(x.shape) for x in refused.tensors()]) for refused in trace.refused)
        whole[1].how = "fixed"
        whole[1].notes = (f"only for sizes like the example's: the original takes {sizes} too",)
    return whole


def _become(model: nn.Module, folded: nn.Module) -> nn.Module:
    """Every reference to the model is one to the folded network from here on."""
    model.__class__ = type(folded)
    model.__dict__ = folded.__dict__
    return model


@dataclass
class _Checked:
    """The original's results, to compare the folded network's with."""

    inputs: tuple[Inputs, ...]
    exact: list[list[Tensor]]
    own: list[list[Tensor]]

    @classmethod
    def of(cls, working: nn.Module, inputs: Inputs) -> _Checked:
        tried = (inputs, inputs.random())
        own = [outputs(evaluate(working, i)) for i in tried]
        try:
            wide = copied(working, share=False).double()
            exact = [outputs(evaluate(wide, i.to(torch.float64))) for i in tried]
        except Exception:  # it casts by itself, or has no float64 kernels: its own results must do
            exact = own
        return cls(tried, exact, own)

    def limit(self, tolerance: float | None) -> float:
        """Return the relative error that a fold may make."""
        return gate.tolerance_for(tolerance, [t.dtype for t in self.own[0] if t.is_floating_point()])

    def error(self, folded: nn.Module) -> gate.Error:
        """Return the largest errors of any run."""
        found = [outputs(evaluate(folded, i)) for i in self.inputs]
        own, after, exact = ([t for run in runs for t in run] for runs in (self.own, found, self.exact))
        return gate.Error.of(gate.Results(own, after, exact))


@dataclass
class _Found:
    """What became of each batch normalization."""

    how: str
    changed: list[Change] = field(default_factory=list)
    left: list[Change] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def _fold_graph(trace: tracing.Trace, limit: float, working: nn.Module, prefix: str = "") -> tuple[nn.Module, _Found]:
    network = TorchNetwork(trace)
    norms = sorted((*network.norms, *network.unfoldable), key=network.order.__getitem__)
    channels = {node: norm.channels for node, norm in network.norms.items()}
    search = Search(network, limit, partial(try_plan, network))
    search.fold_all()
    places = {node: _place(network, node) for where in search.taken.values() for node in where}
    emitter = Emitter(network)
    folded = emitter.emit(type(working).__name__)
    found = _Found(trace.how)
    for node in norms:
        path = _place(network, node)
        was, reason = _describe_norm(working, path, channels.get(node)), search.reasons.get(node, "")
        path = _joined(prefix, path)
        if node in search.taken:
            into = ", ".join(dict.fromkeys(_joined(prefix, places[n]) for n in search.taken[node]))
            found.changed.append(Change(path, was, f"in {into}"))
        elif node in emitter.fused:
            found.changed.append(Change(path, was, f"fused with {emitter.fused[node]}", reason))
        else:
            found.left.append(Change.unchanged(path, was, reason))
    return folded, found


def _place(network: TorchNetwork, node: Node) -> str:
    """Return the path of the module that holds the call's weight, or calls it."""
    state = network.states.get(node)
    owner = state.name.rpartition(".")[0] if isinstance(state, TorchLinear) else ""
    return owner or network.trace.paths.get(node) or node.name


def _joined(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _describe_norm(working: nn.Module, path: str, channels: int | None) -> str:
    try:
        module = working.get_submodule(path)
    except AttributeError:
        module = None
    name = type(module).__name__ if module is not None and walk.is_batch_norm(module) else "batch_norm"
    return f"{name}({'' if channels is None else channels})"


def _fold_modules(
    working: nn.Module, inputs: Inputs, limit: float, checked: _Checked, ways: tuple[str, ...]
) -> tuple[nn.Module, _Found]:
    """Fold the largest parts that can be traced, each with what it is called with in a run of the whole."""
    calls: dict[nn.Module, Inputs] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(module, Inputs(args, kwargs).map(torch.clone))

    with walk.restored(working):
        for module in working.modules():
            module.register_forward_pre_hook(keep, with_kwargs=True)
        evaluate(working, inputs)
    found = _Found("modules")
    done: set[nn.Module] = set()

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            path = f"{prefix}.{name}" if prefix else name
            if child in done or not walk.norm_layers(child):
                continue
            done.add(child)
            if walk.is_batch_norm(child):
                was = _describe_norm(working, path, getattr(child, "num_features", None))
                found.left.append(Change.unchanged(path, was, "what calls it cannot be traced"))
                continue
            part = _fold_part(working, child, calls.get(child), limit, path, checked, ways)
            if part is None:
                visit(child, path)
            else:
                found.changed += part.changed
                found.left += part.left

    visit(working, "")
    return working, found


def _fold_part(
    working: nn.Module, child: nn.Module, given: Inputs | None, limit: float, path: str, checked: _Checked,
    ways: tuple[str, ...],
) -> _Found | None:  # fmt: skip
    """Put the folded part in the place of the part; None, and nothing changed, where that cannot be done."""
    if given is None:
        return None
    try:
        trace = tracing.trace(copied(child, share=True), given, ways=ways, prepare=lowering.lower)
    except Untraceable:
        return None
    if trace.refused:
        return None
    folded, found = _fold_graph(trace, limit, child, path)
    walk.replace(working, child, folded)
    try:
        same = checked.error(working).allowed(limit, gate.AMPLIFICATION)
    except Exception:  # the rest reaches into the part
        same = False
    if not same:
        walk.replace(working, folded, child)
        return None
    return found
