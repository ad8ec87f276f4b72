"""Remove biases that batch normalization cancels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from batchnorm import _checks, walk
from batchnorm.distributed.owners import check_not_reduced, check_not_sharded
from batchnorm.models.data.inputs import Inputs, evaluate
from batchnorm.models.data.outputs import check_unchanged
from batchnorm.models.execution.recording import record_calls
from batchnorm.models.graphs import forward_graph as forward_tracing
from batchnorm.models.graphs.tracing import Untraceable
from batchnorm.models.report import Change, Report, Result
from batchnorm.nn.followed import followers
from batchnorm.surgery.accelerate.find_fusions import caller_of
from batchnorm.surgery.accelerate.fused_forward import undo_fusion
from batchnorm.undo import UndoOnFailure, overwrite, restorer
from batchnorm.walk import is_hooked

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_CALLER = "drop_redundant_bias"
_DEEPEST = 16  # the most modules to search between a layer and the one before it


def drop_redundant_bias(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> Result[Report]:
    """Remove the biases that batch normalization cancels.

    If the output of a convolution or linear layer only goes to batch normalization, its bias only shifts the mean of
    the batch, which is subtracted. Such a bias is removed, and subtracted from the running mean, so that the output
    stays the same in both modes. The module's `bias` becomes None, and disappears from the `state_dict`. A bias is left
    if the layer after it does not normalize by the batch in training: a frozen layer, or one that stays in evaluation
    mode.

    Args:
        model: Any module, not yet in `DistributedDataParallel`.
        optimizer: The model's optimizer; the biases are removed from its groups and state too. Needs `inplace=True`.
        example_inputs: As in `accelerate`. With them, linear layers are considered too (batch normalization treats
            `[N, C]` and `[N, L, C]` differently), and the output is compared.
        inplace: Whether to change the model itself instead of a copy.

    Returns:
        The model, and the report: the biases that were removed, and the others with the reason.

    Raises:
        TypeError: model is not a module, or optimizer is not an optimizer.
        ValueError: an optimizer is passed without inplace=True, or holds other parameters; the model does not take the
            example inputs, or its output on them would change; the model is in DistributedDataParallel or sharded. The
            model is then unchanged.

    Numerics: the running mean is computed in float64 and rounded once.

    Source: Ioffe & Szegedy 2015, section 3.2.

    Examples:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> model, report = drop_redundant_bias(block)
        >>> print(report)
        drop_redundant_bias: 1 changed, 0 left
        <BLANKLINE>
        layer  was              now           why
        0      Conv2d with bias  without bias  before 1
    """
    _check(model, optimizer, inplace)
    if not inplace:
        model = walk.copied(_CALLER, model)
    trial = walk.trial_copy(_CALLER, model)
    layers = walk.norm_layers(trial)
    inputs = None if example_inputs is None else Inputs.of(example_inputs)
    with walk.as_in_training(trial):
        uncancelled = {layer.path: why for layer in layers if (why := _why_uncancelled(layer.module))}
    with walk.restored(trial, buffers=True):
        undo_fusion(trial)
        before, calls = None, None
        if inputs is not None:
            before, calls = record_calls(_CALLER, trial, [f.path for f in layers], inputs)
        pairs, left = _redundant_biases(trial, layers, uncancelled, calls)

    drops = [_Drop(model.get_submodule(producer), model.get_submodule(norm)) for producer, norm in pairs]
    changes = [
        Change(producer, f"{type(model.get_submodule(producer)).__name__} with bias", "without bias", f"before {norm}")
        for producer, norm in pairs
    ]
    report = Report(_CALLER, tuple(changes), tuple(left))
    with UndoOnFailure() as undo:
        for drop in drops:
            drop.do(undo)
        if inputs is not None:
            with walk.restored(model, buffers=True):
                walk.set_mode(model, training=False)
                after = evaluate(model, inputs)
            check_unchanged(_CALLER, before, after, "Some code outside the traced forward uses a bias")
        if optimizer is not None:
            for group in optimizer.param_groups:
                undo.before(group.update, dict(group))
            undo.before(optimizer.state.update, dict(optimizer.state))
            _remove_parameters(optimizer, [drop.bias for drop in drops])
        return Result(model, report)


class _Drop:
    """The removal of one bias from its module, with the running mean lowered by it."""

    def __init__(self, producer: nn.Module, norm: nn.Module) -> None:
        self.producer = producer
        bias = producer.bias
        assert isinstance(bias, nn.Parameter)
        self.bias = bias
        mean = norm.running_mean
        self.mean = mean if isinstance(mean, Tensor) else None

    @torch.no_grad()
    def do(self, undo: UndoOnFailure) -> None:
        undo.before(self.producer.register_parameter, "bias", self.bias)
        self.producer.register_parameter("bias", None)
        if self.mean is not None:
            undo.before(restorer(self.mean))
            overwrite(self.mean, self.mean.double() - self.bias.double())


def _check(model: nn.Module, optimizer: torch.optim.Optimizer | None, inplace: bool) -> None:
    _checks.check_module(_CALLER, model)
    check_not_sharded(_CALLER, model)
    why = "waits for the gradient of every parameter: drop the biases first, then wrap the model"
    check_not_reduced(_CALLER, model, why)
    if optimizer is None:
        return
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"{_CALLER} expects a torch.optim.Optimizer as the second argument, got {type(optimizer).__name__}. "
            "Pass inputs of the model as example_inputs=."
        )
    if not inplace:
        raise ValueError(
            f"{_CALLER} expects inplace=True with an optimizer, got inplace=False. "
            "The optimizer holds the parameters of this model, not of a copy."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"{_CALLER} expects the optimizer of this model, got one ({type(optimizer).__name__}) that "
            "holds none of its parameters. Pass the one made from model.parameters()."
        )


def _why_uncancelled(layer: nn.Module) -> str:
    """Return why a bias before the layer may have an effect in training; empty if the layer subtracts it."""
    if walk.is_frozen(layer):
        return "the layer after it is frozen, so nothing subtracts the bias in training"
    if walk.has_own_forward(layer) and not followers(layer):
        return f"the layer after it, {type(layer).__name__}, has its own forward, which may not subtract the bias"
    if not walk.uses_batch(layer):
        return "the layer after it stays in evaluation mode in training, so nothing subtracts the bias"
    return ""


def _redundant_biases(
    model: nn.Module, layers: list[walk.Found], uncancelled: dict[str, str], calls: dict[str, Inputs] | None
) -> tuple[list[tuple[str, str]], list[Change]]:
    """Return the paths of each module with a redundant bias and of the layer after it, and the biases that are left."""
    pairs: list[tuple[str, str]] = []
    left: list[Change] = []
    for layer in layers:
        try:
            producer = _producer_of(model, layer.path, calls)
        except Untraceable as reason:
            name = type(layer.module).__name__
            left.append(Change.unchanged(layer.path, name, str(reason)))
            continue
        module = None if producer is None else model.get_submodule(producer)
        if producer is None or module is None:
            continue
        if why := uncancelled.get(layer.path) or _why_kept(model, producer, module, layer, calls):
            name = f"{type(module).__name__} with bias"
            left.append(Change.unchanged(producer, name, why))
        else:
            pairs.append((producer, layer.path))
    return pairs, left


def _why_kept(
    model: nn.Module, producer: str, module: nn.Module, layer: walk.Found, calls: dict[str, Inputs] | None
) -> str:
    """Return the reason to keep a bias before a layer; empty if the bias is redundant."""
    bias = module._parameters.get("bias")
    if bias is None:
        return "its bias is computed from other parameters"
    places = sum(part is module for _, part in model.named_modules(remove_duplicate=False))
    uses = sum(p is bias for part in model.modules() for p in part._parameters.values())
    if places > 1 or uses > 1 or len(layer.paths) > 1:
        return "it, its bias or the layer after it is used in several places"
    if is_hooked(module) or is_hooked(layer.module):
        return "it or the layer after it has hooks"
    if bias.numel() != getattr(layer.module, "num_features", None):
        return "the layer after it has other channels"
    channels_last = getattr(layer.module, "channel_dim", 1) == -1
    if channels_last and not isinstance(module, nn.Linear):
        return "its channels are not those of the layer after it, which are in the last dimension"
    if isinstance(module, nn.Linear) and not channels_last:
        if calls is None:
            return "only example_inputs show whether its output is [N, C] or [N, L, C]"
        call = calls.get(layer.path)
        if call is None or not call.args or call.args[0].dim() != 2:
            return "its output is not [N, C] in the example, so its features are not the layer's channels"
    return ""


def _producer_of(model: nn.Module, norm: str, calls: dict[str, Inputs] | None) -> str | None:
    """Return the path of the convolution or linear layer whose output only goes to this layer, or None."""
    layer = model.get_submodule(norm)
    holder, inner = caller_of(model, norm), list[str]()
    for _ in range(_DEEPEST):
        if holder is None:
            return None  # the layer gets the model's input
        root = model.get_submodule(holder)
        try:
            graph = _graph(model, holder, inner, calls)
        except Untraceable as reason:
            raise Untraceable(f"{holder or 'the model'} ({type(root).__name__}) {reason}") from reason
        nodes = [n for n in graph.nodes if n.op == "call_module" and root.get_submodule(n.target) is layer]
        if len(nodes) > 1:
            raise Untraceable("it is called several times")
        value = _input_of(nodes[0], root) if nodes else None
        if value is None or value.op == "placeholder":
            inner, holder = [*inner, holder], caller_of(model, holder)
        elif value.op != "call_module":
            return None  # an addition, a concatenation
        else:
            module, path = root.get_submodule(value.target), walk.joined(holder, str(value.target))  # type: ignore[arg-type]
            if _is_plain(module):
                if getattr(module, "bias", None) is None:
                    return None
                if not _has_one_use(graph, root, value):
                    raise Untraceable(f"the bias of {path} has other uses too")
                return path
            if next(module.children(), None) is None:
                return None  # an activation, a pooling
            inner.append(path)
    return None


def _graph(model: nn.Module, holder: str, inner: list[str], calls: dict[str, Inputs] | None) -> fx.Graph:
    root = model.get_submodule(holder)
    inlined = [model.get_submodule(path) for path in inner]
    graph, _ = forward_tracing.graph_as_called(root, holder, inlined, calls, "next to the layer")
    return graph


def _input_of(call: fx.Node, root: nn.Module) -> fx.Node:
    """Return the node that computes the input of a call; identities in between are skipped."""
    node = call
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if not _is_identity(node, root):
            break
    return node


def _is_identity(node: fx.Node, root: nn.Module) -> bool:
    return node.op == "call_module" and type(root.get_submodule(str(node.target))) is nn.Identity


def _is_plain(module: nn.Module) -> bool:
    kinds: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, nn.Linear)
    own: Callable[..., Any] = type(module).forward
    return any(isinstance(module, kind) and own is kind.forward for kind in kinds)


def _has_one_use(graph: fx.Graph, root: nn.Module, call: fx.Node) -> bool:
    """Return whether the module is called once, its output has one user, and its parameters have no other use."""
    module = root.get_submodule(call.target)  # type: ignore[arg-type]
    others = [n for n in graph.nodes if n.op == "call_module" and root.get_submodule(n.target) is module]
    read = [n for n in graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{call.target}.")]
    result = call
    while len(result.users) == 1 and _is_identity(user := next(iter(result.users)), root):
        result = user
    return len(others) == 1 and not read and len(result.users) == 1


def _remove_parameters(optimizer: torch.optim.Optimizer, biases: list[nn.Parameter]) -> None:
    """Remove parameters from an optimizer's groups and state; empty groups stay, because schedulers count them."""
    gone = {id(bias) for bias in biases}
    for group in optimizer.param_groups:
        remaining = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][i] for i in remaining]
        group["params"] = [group["params"][i] for i in remaining]
    for bias in biases:
        optimizer.state.pop(bias, None)
